// Online softmax over a block of scores: scores -> integer weights, rescaling the running output when the peak rises.
//
// Weights are taken relative to the block's own peak and the block's largest value scale, so that the 16-bit grid is used in full
// whatever the rest of the sequence holds; `scale` carries the difference to the running peak.
#ifndef KVFOLD_SOFTMAX_H
#define KVFOLD_SOFTMAX_H

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../half.h"
#include "level.h"

namespace kvfold {
namespace {

constexpr int kBlockTokens = kBlockPages * kPageTokens;
constexpr float kMasked = -3e38f;

struct ScoreBlock {
  alignas(64) float scores[kTileRows][kBlockTokens];
  alignas(64) float value_scales[kBlockTokens];
  std::int32_t sum[kTileRows];  // of integer weights
  float scale[kTileRows];       // of one unit of integer weight
};

// Hides what is not to be read through pages in the block of `pages` that starts at page `first` of the task. Comes after value
// scales were loaded: those of hidden tokens are stale in a trimmed page, and must not set the grid of the others.
inline void mask_block(ScoreBlock& block, const PagesTask& task, std::int64_t first, int pages, int rows) {
  const std::int64_t start = first * kPageTokens, tokens = pages * kPageTokens;
  if (start >= task.first_token && start + tokens <= task.end_token) return;
  const auto begin = std::clamp<std::int64_t>(task.first_token - start, 0, tokens);
  const auto end = std::clamp<std::int64_t>(task.end_token - start, begin, tokens);
  const auto hide = [=](float* of, float with) {
    std::fill(of, of + begin, with);
    std::fill(of + end, of + tokens, with);
  };
  for (int r = 0; r < rows; ++r) hide(block.scores[r], kMasked);
  hide(block.value_scales, 0.0f);
}

template <class Simd>
void load_scales(const std::uint8_t* halves, float* out) {
  const auto* source = reinterpret_cast<const std::uint16_t*>(halves);
  for (int t = 0; t < kPageTokens; t += Simd::kWidth) Simd::store(out + t, Simd::load_half(source + t));
}

// Raises the running peak of row r to `peak`, which is larger.
template <class Simd>
void raise_peak(TileState& state, int r, float peak, int dim) {
  const float shrink = std::exp2(state.peak[r] - peak);
  state.peak[r] = peak;
  state.total[r] *= shrink;
  for (int j = 0; j < dim; j += Simd::kWidth)
    Simd::store(state.output[r] + j, Simd::mul(Simd::set(shrink), Simd::load(state.output[r] + j)));
}

// exp2(a - b) of a few numbers.
template <class Simd, int Count>
void exp2_of_differences(const float* a, const float* b, float* out) {
  static_assert(Count <= kTileRows, "padded to whole vectors below");
  constexpr int kPadded = kTileRows > Simd::kWidth ? kTileRows : Simd::kWidth;
  alignas(64) float x[kPadded] = {};
  for (int r = 0; r < Count; ++r) x[r] = a[r] - b[r];
  for (int r = 0; r < Count; r += Simd::kWidth) Simd::store(x + r, Simd::exp2(Simd::load(x + r)));
  for (int r = 0; r < Count; ++r) out[r] = x[r];
}

// Makes value_scales relative to the largest one times the grid; returns what one grid unit is worth.
template <class Simd>
float normalise_value_scales(ScoreBlock& block, int tokens) {
  auto top = Simd::set(1e-20f);
  for (int t = 0; t < tokens; t += Simd::kWidth) top = Simd::max(top, Simd::load(block.value_scales + t));
  // exp2 may exceed 1 by a few millionths; the margin keeps the product on the grid.
  const float to_grid = kGridTop * (1.0f - 8e-6f) / Simd::reduce_max(top);
  for (int t = 0; t < tokens; t += Simd::kWidth)
    Simd::store(block.value_scales + t, Simd::mul(Simd::set(to_grid), Simd::load(block.value_scales + t)));
  return 1.0f / to_grid;
}

// Rows [first, first + Rows) of a block; their chains of operations are independent and run interleaved.
template <class Simd, int Rows, class Sink>
void softmax_rows(ScoreBlock& block, int pages, int first, int dim, float unit, TileState& state, Sink& sink) {
  using Float = typename Simd::Float;
  const int tokens = pages * kPageTokens;
  Float vectors[Rows];
  for (auto& v : vectors) v = Simd::set(kNothing);
  for (int t = 0; t < tokens; t += Simd::kWidth)
    for (int r = 0; r < Rows; ++r) vectors[r] = Simd::max(vectors[r], Simd::load(block.scores[first + r] + t));
  float peaks[Rows], relative[Rows];
  for (int r = 0; r < Rows; ++r) peaks[r] = Simd::reduce_max(vectors[r]);
  for (int r = 0; r < Rows; ++r)
    if (peaks[r] > state.peak[first + r]) raise_peak<Simd>(state, first + r, peaks[r], dim);
  exp2_of_differences<Simd, Rows>(peaks, state.peak + first, relative);
  Float offsets[Rows], totals[Rows];
  for (int r = 0; r < Rows; ++r) {
    offsets[r] = Simd::set(peaks[r]);
    totals[r] = Simd::set(0.0f);
  }
  typename Simd::Int sums[Rows];
  for (auto& sum : sums) sum = Simd::zero_int();
  for (int t = 0; t < tokens; t += Simd::kWidth) {
    sink.tick();
    const Float scale = Simd::load(block.value_scales + t);
    for (int r = 0; r < Rows; ++r) {
      const Float weight = Simd::exp2(Simd::sub(Simd::load(block.scores[first + r] + t), offsets[r]));
      totals[r] = Simd::add(totals[r], weight);
      const auto grid = Simd::round(Simd::mul(weight, scale));
      if constexpr (Sink::kNeedsSums) sums[r] = Simd::add_int(sums[r], grid);
      sink.put(first + r, t, grid);
    }
  }
  if constexpr (Sink::kNeedsSums)
    for (int r = 0; r < Rows; ++r) block.sum[first + r] = Simd::reduce_add_int(sums[r]);
  for (int r = 0; r < Rows; ++r) {
    state.total[first + r] += relative[r] * Simd::reduce_add(totals[r]);
    block.scale[first + r] = relative[r] * unit;
  }
}

// How often softmax() walks a block's tokens for that many rows; Sink::tick is called once per vector of tokens and pass.
inline int softmax_passes(int rows) { return rows / 4 + rows % 4; }

template <class Simd, class Sink>
void softmax(ScoreBlock& block, int pages, int rows, int dim, TileState& state, Sink& sink) {
  const float unit = normalise_value_scales<Simd>(block, pages * kPageTokens);
  int first = 0;
  for (; first + 4 <= rows; first += 4) softmax_rows<Simd, 4>(block, pages, first, dim, unit, state, sink);
  for (; first < rows; ++first) softmax_rows<Simd, 1>(block, pages, first, dim, unit, state, sink);
}

}  // namespace
}  // namespace kvfold
#endif
