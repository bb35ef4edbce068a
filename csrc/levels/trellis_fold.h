// The trellis encoder of a page, bit for bit the canonical one: lanes of vectors side by side through rotation, search, scales and
// packing. Every array is [coordinate][lane], so that butterflies and sums along the halving tree are operations on whole rows.
//
//   y = H (s * x)     r = sqrt(tree(y * y) / D)     u = y / r by one reciprocal     input = gain * u, rounded and clipped
//   path by search, of one or three gains the one with the largest <u, L>^2 / |L|^2
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

// Streams of tokens first .. first + kCount - 1.
template <int kCount>
void pack_rows(const std::uint8_t (*symbols)[kCount], int dim, const kvf_trellis_reader& code, bool keys, int first, std::uint8_t* out) {
  alignas(64) std::uint8_t bytes[kMaxStream][kCount];
  alignas(64) std::uint32_t bits[kCount] = {};
  int held = 0, n = 0;
  for (int j = 0; j < dim; ++j) {
    const int width = code.widths[j % 2];
    each_lane<kCount>([&](int v) {  // entering(), on all lanes
      const std::uint32_t s = symbols[j][v];
      bits[v] |= ((s & 1) << 3 | (s & 2) << 1 | (s & 4) >> 1 | s >> 3) >> (4 - width) << held;
    });
    held += width;
    if (held < 8) continue;
    held -= 8;
    each_lane<kCount>([&](int v) {
      bytes[n][v] = static_cast<std::uint8_t>(bits[v]);
      bits[v] >>= 8;
    });
    ++n;
  }
  const StreamOrder order(code, dim, keys);
  for (int segment = 0; segment < order.segments; segment += keys ? 4 : 1)
    for (int c = 0; c < order.bytes; ++c) {
      const std::uint8_t(*byte)[kCount] = bytes + segment * order.bytes + c;
      for (int v = 0; v < kCount; v += keys ? 1 : 4) {
        std::uint8_t word[4];
        for (int i = 0; i < 4; ++i) word[i] = keys ? byte[i * order.bytes][v] : byte[0][v + i];
        std::memcpy(out + order.first(first + v) + order.offset(segment, c), word, sizeof word);
      }
    }
}

// Vectors of one block on their way: u, the inputs made of it, and a path with what it is worth.
template <int kCount>
struct Block {
  struct Path {
    std::uint8_t symbols[kMaxDim][kCount], starts[kCount];
    std::int8_t levels[kMaxDim][kCount];
    float dot[kCount], square[kCount];  // <u, L>, <L, L>
  };
  alignas(64) float u[kMaxDim][kCount];
  alignas(64) std::int16_t inputs[kMaxDim][kCount];
  float radius[kCount];
  Path best, tried;
};

// False: a vector is not finite.
template <class Simd, int kCount>
bool normalise_rows(const TrellisFold& task, int first, Block<kCount>& block) {
  auto& u = block.u;
  const float dims = static_cast<float>(task.dim);
  load_turned<Simd, kCount>(task, first, u);
  hadamard_rows<kCount>(u, task.dim);
  tree_rows<kCount>(task.dim, block.radius, [&](int j, int v) { return u[j][v] * u[j][v]; });
  alignas(64) float inverse[kCount];
  for (int v = 0; v < kCount; ++v) {
    block.radius[v] = std::sqrt(block.radius[v] / dims);
    if (!(block.radius[v] <= 3.4e38f)) return false;
    inverse[v] = block.radius[v] > 0.0f ? 1.0f / block.radius[v] : 0.0f;
  }
  for (int j = 0; j < task.dim; ++j) each_lane<kCount>([&](int v) { u[j][v] *= inverse[v]; });
  return true;
}

// The path of u times `gain`.
template <class Lanes, int kCount>
void try_gain(const Paths& paths, int dim, float gain, Block<kCount>& block, typename Block<kCount>::Path& path) {
  const float clip = static_cast<float>(paths.code.clip);
  for (int j = 0; j < dim; ++j)
    each_lane<kCount>([&](int v) {
      float input = block.u[j][v] * gain;
      input = input < -clip ? -clip : input;
      input = input > clip ? clip : input;
      block.inputs[j][v] = static_cast<std::int16_t>(static_cast<std::int32_t>(nearest_integer(input)));
    });
  search<Lanes>(paths, {&paths.code, block.inputs[0], path.symbols[0], path.levels[0], path.starts, dim});
  tree_rows<kCount>(dim, path.dot, [&](int j, int v) { return block.u[j][v] * static_cast<float>(path.levels[j][v]); });
  tree_rows<kCount>(dim, path.square, [&](int j, int v) {
    const float level = static_cast<float>(path.levels[j][v]);
    return level * level;
  });
}

// Keeps the path that was tried for the vectors that it suits better. The level of a symbol is not asked for again.
template <int kCount>
void keep_better(int dim, Block<kCount>& block) {
  std::uint8_t better[kCount];
  for (int v = 0; v < kCount; ++v) {
    const Fit tried{block.tried.dot[v], block.tried.square[v]}, best{block.best.dot[v], block.best.square[v]};
    better[v] = tried.gain() > best.gain() ? 1 : 0;
    if (better[v] == 0) continue;
    block.best.dot[v] = tried.dot;
    block.best.square[v] = tried.square;
    block.best.starts[v] = block.tried.starts[v];
  }
  for (int j = 0; j < dim; ++j)
    each_lane<kCount>(
        [&](int v) { block.best.symbols[j][v] = better[v] != 0 ? block.tried.symbols[j][v] : block.best.symbols[j][v]; });
}

// Codes of one block of vectors; their scales, and the numbers of their start states. False: a vector is not finite.
template <class Simd, class Lanes>
bool encode_rows(const TrellisFold& task, const Paths& paths, int first, float* scales, std::uint8_t* starts) {
  constexpr int kCount = Lanes::kLanes;
  constexpr float kFactors[3] = {1.0f, 0.95f, 1.06f};  // of the code's gain; the first of the best paths wins
  Block<kCount> block;
  if (!normalise_rows<Simd, kCount>(task, first, block)) return false;
  try_gain<Lanes, kCount>(paths, task.dim, paths.code.gain, block, block.best);
  for (int i = 1; i < task.side->searches; ++i) {
    try_gain<Lanes, kCount>(paths, task.dim, paths.code.gain * kFactors[i], block, block.tried);
    keep_better<kCount>(task.dim, block);
  }
  for (int v = 0; v < kCount; ++v) {
    const float radius = block.radius[v];
    scales[first + v] =
        radius > 0.0f ? scale_of(task.side->scale_rule, task.side->step, task.dim, radius, {block.best.dot[v], block.best.square[v]})
                      : 0.0f;
    std::uint8_t number = 0;
    for (int s = 0; s < block.best.starts[v]; ++s) number = static_cast<std::uint8_t>(number + (paths.code.starts >> s & 1));
    starts[first + v] = number;
  }
  pack_rows<kCount>(block.best.symbols, task.dim, *task.side->trellis, task.keys, first, task.codes);
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
