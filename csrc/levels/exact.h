// Attention of query rows over exact tokens (ring, sinks, new tokens) in float32, 32 tokens at a time.
//
// Row r of tile i sees the first limits[8 i + r] tokens: that is how causality enters. Each block is converted once and used by every
// row of every tile; softmax state is the same as for pages, in the unrotated basis. Few rows read keys token by token; for many rows
// (prefill) a block's keys are turned once, so that a vector holds one coordinate of several tokens and no sum runs across lanes.
#ifndef KVFOLD_EXACT_H
#define KVFOLD_EXACT_H

#include <cstdint>
#include <cstring>

#include "level.h"
#include "softmax.h"
#include "unroll.h"

namespace kvfold {
namespace {

constexpr int kExactTokens = 32;

template <class Simd>
typename Simd::Float load_as(const void* data, std::int64_t index, int dtype) {
  if (dtype == KVF_FLOAT32) return Simd::load(static_cast<const float*>(data) + index);
  const auto* halves = static_cast<const std::uint16_t*>(data) + index;
  return dtype == KVF_BFLOAT16 ? Simd::load_bfloat16(halves) : Simd::load_half(halves);
}

template <class Simd>
void convert_block(const void* data, std::int64_t first, std::int64_t stride, int tokens, int dim, int dtype, float* out) {
  for (int t = 0; t < tokens; ++t)
    for (int j = 0; j < dim; j += Simd::kWidth)
      Simd::store(out + t * kMaxDim + j, load_as<Simd>(data, (first + t) * stride + j, dtype));
}

// <query, key> of Rows rows and `tokens` tokens: keys are loaded once for all rows.
template <class Simd, int Rows>
void exact_scores(const QueryTile& tile, int first, const float* keys, int tokens, int dim, float (*scores)[kExactTokens]) {
  for (int t = 0; t < tokens; ++t) {
    typename Simd::Float sums[Rows];
    for (auto& sum : sums) sum = Simd::set(0.0f);
    for (int j = 0; j < dim; j += Simd::kWidth) {
      const auto key = Simd::load(keys + t * kMaxDim + j);
      for (int r = 0; r < Rows; ++r) sums[r] = Simd::fma(key, Simd::load(tile.query[first + r] + j), sums[r]);
    }
    for (int r = 0; r < Rows; ++r) scores[r][t] = Simd::reduce_add(sums[r]);
  }
}

// [token][coordinate] -> [coordinate][token]; tokens beyond the block's end are copied too and masked later.
template <class Simd>
void turn_block(const float* keys, int dim, float* turned) {
  constexpr int kWidth = Simd::kWidth;
  for (int t = 0; t < kExactTokens; t += kWidth)
    for (int j = 0; j < dim; j += kWidth) {
      typename Simd::Float rows[kWidth];
      unroll<kWidth>([&](auto i) { rows[i] = Simd::load(keys + (t + i) * kMaxDim + j); });
      Simd::transpose(rows);
      unroll<kWidth>([&](auto i) { Simd::store(turned + (j + i) * kExactTokens + t, rows[i]); });
    }
}

// Vectors that share the broadcast of a row's number: as many as there are registers for with eight rows.
template <class Simd>
constexpr int kShared = Simd::kBytes == 64 ? 2 : 1;

// sums[r][v] += sum over i of rows[r][i] * matrix[i][v], count of each.
template <class Simd, int Rows>
KVF_INLINE void accumulate(const float* rows, int row_stride, const float* matrix, int stride, int count,
                           typename Simd::Float (&sums)[Rows][kShared<Simd>]) {
  for (int i = 0; i < count; ++i, matrix += stride) {
    typename Simd::Float vectors[kShared<Simd>];
    for (int v = 0; v < kShared<Simd>; ++v) vectors[v] = Simd::load(matrix + v * Simd::kWidth);
    unroll<Rows>([&](auto r) {
      const auto x = Simd::set(rows[r * row_stride + i]);
      for (int v = 0; v < kShared<Simd>; ++v) sums[r][v] = Simd::fma(x, vectors[v], sums[r][v]);
    });
  }
}

// exact_scores over turned keys, always kExactTokens of them.
template <class Simd, int Rows>
void turned_scores(const QueryTile& tile, int first, const float* turned, int dim, float (*scores)[kExactTokens]) {
  for (int t = 0; t < kExactTokens; t += kShared<Simd> * Simd::kWidth) {
    typename Simd::Float sums[Rows][kShared<Simd>];
    for (auto& row : sums)
      for (auto& sum : row) sum = Simd::set(0.0f);
    accumulate<Simd, Rows>(tile.query[first], kMaxDim, turned + t, kExactTokens, dim, sums);
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < kShared<Simd>; ++v) Simd::store(scores[r] + t + v * Simd::kWidth, sums[r][v]);
  }
}

// Scores -> weights relative to the running peak of row r, which rises if it must.
template <class Simd>
void exact_weights(TileState& state, int r, float* scores, int dim) {
  auto top = Simd::set(kNothing);
  for (int t = 0; t < kExactTokens; t += Simd::kWidth) top = Simd::max(top, Simd::load(scores + t));
  const float peak = Simd::reduce_max(top);
  if (peak > state.peak[r]) raise_peak<Simd>(state, r, peak, dim);
  auto total = Simd::set(0.0f);
  for (int t = 0; t < kExactTokens; t += Simd::kWidth) {
    const auto weight = Simd::exp2(Simd::sub(Simd::load(scores + t), Simd::set(state.peak[r])));
    total = Simd::add(total, weight);
    Simd::store(scores + t, weight);
  }
  state.total[r] += Simd::reduce_add(total);
}

// Converted tokens. `turned` is null for few rows.
struct ExactBlock {
  const float *keys, *values, *turned;
};

// Rows [first, first + Rows) of a tile over the first `tokens` of a block; row r sees seen[r] of them.
template <class Simd, int Rows>
void exact_rows(TileState& state, const QueryTile& tile, int first, const ExactBlock& block, const int* seen, int tokens, int dim) {
  alignas(64) float scores[Rows][kExactTokens];
  if (block.turned != nullptr)
    turned_scores<Simd, Rows>(tile, first, block.turned, dim, scores);
  else
    exact_scores<Simd, Rows>(tile, first, block.keys, tokens, dim, scores);
  for (int r = 0; r < Rows; ++r) {
    for (int t = seen[r]; t < kExactTokens; ++t) scores[r][t] = kMasked;
    exact_weights<Simd>(state, first + r, scores[r], dim);
  }
  for (int j = 0; j < dim; j += kShared<Simd> * Simd::kWidth) {
    typename Simd::Float sums[Rows][kShared<Simd>];
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < kShared<Simd>; ++v) sums[r][v] = Simd::load(state.output[first + r] + j + v * Simd::kWidth);
    accumulate<Simd, Rows>(scores[0], kExactTokens, block.values + j, kMaxDim, tokens, sums);
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < kShared<Simd>; ++v) Simd::store(state.output[first + r] + j + v * Simd::kWidth, sums[r][v]);
  }
}

// All rows of a tile; `limits` are theirs, counted from the block's first token.
template <class Simd>
void exact_tile(const ExactTask& task, int index, std::int64_t first_token, int tokens, const ExactBlock& block) {
  const QueryTile& tile = task.tiles[index];
  int seen[kTileRows], most = 0;
  for (int r = 0; r < tile.rows; ++r) {
    const std::int64_t left = task.limits[index * kTileRows + r] - first_token;
    seen[r] = left <= 0 ? 0 : left < tokens ? static_cast<int>(left) : tokens;
    most = seen[r] > most ? seen[r] : most;
  }
  if (most == 0) return;
  int r = 0;
  for (; r + 8 <= tile.rows; r += 8) exact_rows<Simd, 8>(task.states[index], tile, r, block, seen + r, most, task.dim);
  for (; r + 4 <= tile.rows; r += 4) exact_rows<Simd, 4>(task.states[index], tile, r, block, seen + r, most, task.dim);
  for (; r < tile.rows; ++r) exact_rows<Simd, 1>(task.states[index], tile, r, block, seen + r, most, task.dim);
}

template <class Simd>
void attend_exact(const ExactTask& task) {
  alignas(64) float keys[kExactTokens * kMaxDim];
  alignas(64) float values[kExactTokens * kMaxDim];
  alignas(64) float turned[kExactTokens * kMaxDim];
  const bool turns = task.tile_count > 1;
  if (turns) std::memset(keys, 0, sizeof keys);  // so that those beyond the first block's end are numbers
  const ExactBlock block = {keys, values, turns ? turned : nullptr};
  for (std::int64_t first = 0; first < task.count; first += kExactTokens) {
    const int tokens = static_cast<int>(task.count - first < kExactTokens ? task.count - first : kExactTokens);
    convert_block<Simd>(task.keys, first, task.key_stride, tokens, task.dim, task.dtype, keys);
    convert_block<Simd>(task.values, first, task.value_stride, tokens, task.dim, task.dtype, values);
    if (turns) turn_block<Simd>(keys, task.dim, turned);
    for (int i = 0; i < task.tile_count; ++i) exact_tile<Simd>(task, i, first, tokens, block);
  }
}

}  // namespace
}  // namespace kvfold
#endif
