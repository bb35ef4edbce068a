// The trellis encoder of a page, bit for bit the canonical one: lanes of vectors side by side through rotation, search, scales and
// packing. Every array is [coordinate][lane], so that butterflies and sums along the halving tree are operations on whole rows.
//
//   y = H (s * x)     r = sqrt(tree(y * y) / D)     u = y / r by one reciprocal     input = u in steps of the search, rounded and clipped
//   scale by its rule from <u, L> and |L|^2; unit = the page's largest / 50 as float16; header = scale / unit, rounded, and the start
#ifndef KVFOLD_TRELLIS_FOLD_H
#define KVFOLD_TRELLIS_FOLD_H

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../half.h"
#include "../streams.h"
#include "exact.h"
#include "scale.h"
#include "viterbi.h"

namespace kvfold {
namespace {

template <int kCount, class Body>
inline void each_lane(const Body& body) {
  for (int v = 0; v < kCount; ++v) body(v);
}

// s * (x - mean) of the tokens from `first` on.
template <class Simd, int kCount>
void load_turned(const TrellisFold& task, int first, float (*y)[kCount]) {
  alignas(64) float vector[kMaxDim];
  const float* mean = task.means == nullptr ? nullptr : task.means + first / kMeanTokens * task.dim;
  for (int v = 0; v < kCount; ++v) {
    for (int j = 0; j < task.dim; j += Simd::kWidth) {
      auto x = load_as<Simd>(task.data, (first + v) * task.stride + j, task.dtype);
      if (mean != nullptr) x = Simd::sub(x, Simd::load(mean + j));
      Simd::store(vector + j, Simd::mul(x, Simd::load(task.signs + j)));
    }
    for (int j = 0; j < task.dim; ++j) y[j][v] = vector[j];
  }
}

template <int kCount>
void hadamard_rows(float (*y)[kCount], int dim) {
  for (int half = 1; half < dim; half *= 2)
    for (int i = 0; i < dim; i += 2 * half)
      for (int j = i; j < i + half; ++j)
        each_lane<kCount>([&](int v) {
          const float a = y[j][v], b = y[j + half][v];
          y[j][v] = a + b;
          y[j + half][v] = a - b;
        });
}

// Sum of term(j, v) over j along the halving tree; dim is a power of two.
template <int kCount, class Term>
void tree_rows(int dim, float* sum, const Term& term) {
  alignas(64) float part[kMaxDim / 2][kCount];
  int n = dim / 2;
  for (int j = 0; j < n; ++j) each_lane<kCount>([&](int v) { part[j][v] = term(j, v) + term(j + n, v); });
  for (n /= 2; n >= 1; n /= 2)
    for (int j = 0; j < n; ++j) each_lane<kCount>([&](int v) { part[j][v] += part[j + n][v]; });
  std::memcpy(sum, part[0], sizeof part[0]);
}

// Nearest integer, ties to even, of anything below 2^22: the sum has no bits for fractions.
inline float nearest_integer(float x) {
  constexpr float kShift = 12582912.0f;
  return (x + kShift) - kShift;
}

// Words of the streams of tokens first .. first + kCount - 1.
template <int kCount>
void pack_rows(const std::uint8_t (*symbols)[kCount], int dim, const kvf_trellis_reader& code, int first, std::uint8_t* out) {
  const std::size_t words = stream_words(code, dim);
  alignas(64) std::uint32_t word[kCount] = {}, entered[kCount];
  int held = 0;
  std::size_t n = 0;
  for (int j = 0; j < dim; ++j) {
    const int width = code.widths[j % 2];
    each_lane<kCount>([&](int v) {  // entering(), on all lanes
      const std::uint32_t s = symbols[j][v];
      entered[v] = ((s & 1) << 3 | (s & 2) << 1 | (s & 4) >> 1 | s >> 3) >> (4 - width);
      word[v] |= entered[v] << held;
    });
    held += width;
    if (held < 32) continue;
    held -= 32;
    for (int v = 0; v < kCount; v += kCount < kLanes ? kCount : kLanes)
      std::memcpy(out + word_offset(words, first + v, n), word + v, sizeof word[0] * (kCount < kLanes ? kCount : kLanes));
    ++n;
    each_lane<kCount>([&](int v) { word[v] = entered[v] >> (width - held); });
  }
}

// Scales of one block of vectors and the numbers of their start states. False: a vector is not finite.
template <class Simd, class Lanes>
bool encode_rows(const TrellisFold& task, const Paths& paths, int first, float* scales, std::uint8_t* starts) {
  constexpr int kCount = Lanes::kLanes;
  const kvf_trellis& code = paths.code;
  const int dim = task.dim;
  const float dims = static_cast<float>(dim), clip = static_cast<float>(code.clip), gain = code.gain;
  alignas(64) float y[kMaxDim][kCount], radius[kCount], inverse[kCount], dot[kCount], square[kCount];
  alignas(64) std::int16_t inputs[kMaxDim][kCount];
  alignas(64) std::uint8_t symbols[kMaxDim][kCount];
  alignas(64) std::int8_t levels[kMaxDim][kCount];
  std::uint8_t states[kCount];
  load_turned<Simd, kCount>(task, first, y);
  hadamard_rows<kCount>(y, dim);
  tree_rows<kCount>(dim, radius, [&](int j, int v) { return y[j][v] * y[j][v]; });
  for (int v = 0; v < kCount; ++v) {
    radius[v] = std::sqrt(radius[v] / dims);
    if (!(radius[v] <= 3.4e38f)) return false;
    inverse[v] = radius[v] > 0.0f ? 1.0f / radius[v] : 0.0f;
  }
  for (int j = 0; j < dim; ++j)
    each_lane<kCount>([&](int v) {
      y[j][v] *= inverse[v];
      float input = y[j][v] * gain;
      input = input < -clip ? -clip : input;
      input = input > clip ? clip : input;
      inputs[j][v] = static_cast<std::int16_t>(static_cast<std::int32_t>(nearest_integer(input)));
    });
  search<Lanes>(paths, {&code, inputs[0], symbols[0], levels[0], states, dim});
  tree_rows<kCount>(dim, dot, [&](int j, int v) { return y[j][v] * static_cast<float>(levels[j][v]); });
  tree_rows<kCount>(dim, square, [&](int j, int v) {
    const float level = static_cast<float>(levels[j][v]);
    return level * level;
  });
  for (int v = 0; v < kCount; ++v) {
    scales[first + v] = radius[v] > 0.0f ? scale_of(*task.side, dim, radius[v], {dot[v], square[v]}) : 0.0f;
    std::uint8_t number = 0;
    for (int s = 0; s < states[v]; ++s) number = static_cast<std::uint8_t>(number + (code.starts >> s & 1));
    starts[first + v] = number;
  }
  pack_rows<kCount>(symbols, dim, *task.side->trellis, first, task.codes);
  return true;
}

template <class Simd, class Lanes>
bool fold_trellis(const TrellisFold& task) {
  const Paths paths(*task.side->search, Lanes::kLanes);
  float scales[kPageTokens], longest = 0.0f;
  std::uint8_t starts[kPageTokens];
  for (int t = 0; t < kPageTokens; t += Lanes::kLanes)
    if (!encode_rows<Simd, Lanes>(task, paths, t, scales, starts)) return false;
  for (int t = task.skipped; t < kPageTokens; ++t) longest = scales[t] > longest ? scales[t] : longest;
  const std::uint16_t half = float_to_half(longest / kFullScale);
  if ((half & 0x7c00u) == 0x7c00u) return false;
  const float unit = half_to_float(half), most = static_cast<float>(kScaleCode);
  std::memcpy(task.unit, &half, sizeof half);
  for (int t = 0; t < kPageTokens; ++t) {
    float scale = 0.0f;  // a unit of zero is that of vectors too short for it
    if (scales[t] > 0.0f) scale = unit > 0.0f ? std::nearbyint(scales[t] / unit) : most;
    scale = scale > most ? most : scale;
    task.headers[t] = static_cast<std::uint8_t>(static_cast<int>(scale) | starts[t] << 6);
  }
  return true;
}

}  // namespace
}  // namespace kvfold
#endif
