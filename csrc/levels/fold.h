// The canonical encoder: one KV head of one page, vectors -> codes, scales and mean keys, bit for bit the same on every level.
//
//   y = H (s * x), butterflies of distance 1, 2, 4, ... (then O_3 across blocks of 32 if D = 96)     ss = tree(y * y)     r = sqrt(ss / D)     u = y / r by one reciprocal
//   code = number of thresholds below f u, of the f in {1, .9, 1.1} with the largest <u, L>^2 / |L|^2; sums run along the halving tree (first half plus second half); no fused multiply-add.
//
// Codes go to a [128][D] buffer and from there, plane by plane, into the engine's order (format.h).
#ifndef KVFOLD_FOLD_H
#define KVFOLD_FOLD_H

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../format.h"
#include "../half.h"
#include "../pack.h"
#include "exact.h"
#include "level.h"
#include "scale.h"
#include "unroll.h"

namespace kvfold {
namespace {

template <class Simd, int Dim>
struct Vector {
  static constexpr int kParts = Dim / Simd::kWidth;
  static constexpr int kBlock = (Dim & -Dim) / Simd::kWidth;  // parts of a power of two
  typename Simd::Float part[kParts];

  void hadamard() {
    for (auto& p : part) {
      if constexpr (Simd::kWidth > 1) p = Simd::template butterfly<1>(p);
      if constexpr (Simd::kWidth > 2) p = Simd::template butterfly<2>(p);
      if constexpr (Simd::kWidth > 4) p = Simd::template butterfly<4>(p);
      if constexpr (Simd::kWidth > 8) p = Simd::template butterfly<8>(p);
    }
    for (int half = 1; half < kBlock; half *= 2)
      for (int i = 0; i < kParts; ++i)
        if ((i & half) == 0) {
          const auto a = part[i], b = part[i + half];
          part[i] = Simd::add(a, b);
          part[i + half] = Simd::sub(a, b);
        }
    if constexpr (kParts == 3 * kBlock) hartley();
  }

  // The 3 x 3 Hartley matrix cas(2 pi i j / 3) across blocks, summed from block 0 upwards.
  void hartley() {
    const auto c = Simd::set(0.36602540378443865f), d = Simd::set(-1.3660254037844386f);
    for (int i = 0; i < kBlock; ++i) {
      const auto x = part[i], y = part[i + kBlock], z = part[i + 2 * kBlock];
      part[i] = Simd::add(Simd::add(x, y), z);
      part[i + kBlock] = Simd::add(Simd::add(x, Simd::mul(c, y)), Simd::mul(d, z));
      part[i + 2 * kBlock] = Simd::add(Simd::add(x, Simd::mul(d, y)), Simd::mul(c, z));
    }
  }

  float tree() const {
    Vector sum = *this;
    int n = 1;
    while (2 * n < kParts) n *= 2;
    for (int count = kParts; n >= 1; count = n, n /= 2)  // as if padded with zeros to a power of two
      for (int i = 0; i + n < count; ++i) sum.part[i] = Simd::add(sum.part[i], sum.part[i + n]);
    return Simd::reduce_add(sum.part[0]);
  }
};

template <class Simd, int Dim>
Vector<Simd, Dim> product(const Vector<Simd, Dim>& a, const Vector<Simd, Dim>& b) {
  Vector<Simd, Dim> out;
  for (int i = 0; i < Vector<Simd, Dim>::kParts; ++i) out.part[i] = Simd::mul(a.part[i], b.part[i]);
  return out;
}

template <class Simd, int Dim, int Bits>
Fit nearest(const kvf_side& side, const float* thresholds, const Vector<Simd, Dim>& u, float factor, std::uint8_t* codes) {
  Vector<Simd, Dim> levels;
  for (int i = 0; i < Vector<Simd, Dim>::kParts; ++i) {
    const auto scaled = factor == 1.0f ? u.part[i] : Simd::mul(u.part[i], Simd::set(factor));
    const auto code = Simd::template search<Bits>(scaled, thresholds);
    levels.part[i] = Simd::lookup_level(code, side.levels);
    Simd::store_codes(codes + i * Simd::kWidth, code);
  }
  const bool squared = side.searches > 1 || side.scale_rule >= KVF_SCALE_LEAST_SQUARES;
  return {product(u, levels).tree(), squared ? product(levels, levels).tree() : 1.0f};
}

// One vector -> Dim codes and its scale. False if the scale is not a finite float16.
template <class Simd, int Dim, int Bits>
bool encode(const kvf_side& side, const float* thresholds, Vector<Simd, Dim>& y, std::uint8_t* codes, std::uint16_t* scale) {
  constexpr float kFactors[3] = {1.0f, 0.9f, 1.1f};  // grids of the codebook; the first with the largest gain wins
  y.hadamard();
  const float radius = std::sqrt(product(y, y).tree() / Dim);
  const float inverse = radius > 0.0f ? 1.0f / radius : 0.0f;
  for (auto& part : y.part) part = Simd::mul(part, Simd::set(inverse));
  Fit best = nearest<Simd, Dim, Bits>(side, thresholds, y, kFactors[0], codes);
  alignas(64) std::uint8_t tried[Dim];
  for (int i = 1; i < side.searches; ++i) {
    const Fit fit = nearest<Simd, Dim, Bits>(side, thresholds, y, kFactors[i], tried);
    if (fit.gain() > best.gain()) {
      best = fit;
      std::memcpy(codes, tried, Dim);
    }
  }
  *scale = radius == 0.0f ? 0 : float_to_half(scale_of(side, Dim, radius, best));
  return (*scale & 0x7c00u) != 0x7c00u;
}

template <class Simd, int Dim, int Bits>
bool encode_page(const kvf_side& side, const float* signs, const void* data, std::int64_t stride, int dtype, const float* means,
                 std::uint8_t* codes, std::uint8_t* scales) {
  alignas(64) float thresholds[16] = {};
  std::memcpy(thresholds, side.thresholds, sizeof side.thresholds);
  bool finite = true;
  for (int t = 0; t < kPageTokens; ++t) {
    Vector<Simd, Dim> x;
    for (int i = 0; i < Vector<Simd, Dim>::kParts; ++i) {
      const int j = i * Simd::kWidth;
      auto value = load_as<Simd>(data, t * stride + j, dtype);
      if (means != nullptr) value = Simd::sub(value, Simd::load(means + t / kMeanTokens * Dim + j));
      x.part[i] = Simd::mul(value, Simd::load(signs + j));
    }
    std::uint16_t scale;
    finite &= encode<Simd, Dim, Bits>(side, thresholds, x, codes + t * Dim, &scale);
    std::memcpy(scales + 2 * t, &scale, sizeof scale);
  }
  return finite;
}

// Divides sums by `count` and quantizes the mean to int8; `mean` becomes the dequantized one.
inline bool quantize_mean(float* mean, int dim, float count, std::int8_t* codes, std::uint8_t* scale_bytes) {
  float top = 0.0f;
  for (int j = 0; j < dim; ++j) {
    mean[j] = mean[j] / count;
    if (!(std::fabs(mean[j]) <= 3.4e38f)) return false;
    if (std::fabs(mean[j]) > top) top = std::fabs(mean[j]);
  }
  const std::uint16_t half = float_to_half(top / 127.0f);
  const float scale = half_to_float(half);
  std::memcpy(scale_bytes, &half, sizeof half);
  for (int j = 0; j < dim; ++j) {
    float code = scale == 0.0f ? 0.0f : std::nearbyint(mean[j] / scale);
    code = code > 127.0f ? 127.0f : code < -127.0f ? -127.0f : code;
    codes[j] = static_cast<std::int8_t>(code);
    mean[j] = scale * code;
  }
  return (half & 0x7c00u) != 0x7c00u;
}

// Mean key of tokens [64 half, 64 half + 64) by the halving tree over tokens, the page's skipped ones counting as absent.
template <class Simd>
bool half_mean(const FoldTask& task, int dim, int half, std::int8_t* codes, std::uint8_t* scale_bytes, float* mean) {
  const int first = half * kMeanTokens, absent = task.skipped - first;
  const int count = absent <= 0 ? kMeanTokens : absent < kMeanTokens ? kMeanTokens - absent : 1;
  for (int j = 0; j < dim; j += Simd::kWidth) {
    typename Simd::Float sum[kMeanTokens];
    for (int t = 0; t < kMeanTokens; ++t)
      sum[t] = t < absent ? Simd::set(0.0f) : load_as<Simd>(task.keys, (first + t) * task.key_stride + j, task.dtype);
    for (int n = kMeanTokens / 2; n >= 1; n /= 2)
      for (int t = 0; t < n; ++t) sum[t] = Simd::add(sum[t], sum[t + n]);
    Simd::store(mean + j, sum[0]);
  }
  return quantize_mean(mean, dim, static_cast<float>(count), codes, scale_bytes);
}

// One side of a head as it lies in memory and is to lie in the row.
struct FoldSide {
  const kvf_side& side;
  const float* signs;
  const void* data;
  std::int64_t stride;
  const float* means;  // null: none
  std::uint8_t *codes, *scales, *unit;
  void (*pack)(const std::uint8_t* codes, int dim, int bits, std::uint8_t* out);
};

template <class Simd, int Dim>
bool fold_side(const FoldTask& task, const FoldSide& s) {
  if (s.side.trellis != nullptr)
    return task.trellis->fold(
        {&s.side, s.signs, s.means, s.data, s.stride, task.dtype, Dim, task.skipped, s.codes, s.scales, s.unit});
  alignas(64) std::uint8_t codes[kPageTokens * Dim];
  const auto encode = s.side.bits == 4   ? encode_page<Simd, Dim, 4>
                      : s.side.bits == 3 ? encode_page<Simd, Dim, 3>
                                         : encode_page<Simd, Dim, 2>;
  if (!encode(s.side, s.signs, s.data, s.stride, task.dtype, s.means, codes, s.scales)) return false;
  s.pack(codes, Dim, s.side.bits, s.codes);
  return true;
}

template <class Simd, int Dim>
bool fold_head(const FoldTask& task) {
  const kvf_format& format = *task.format;
  const Layout layout(format);
  const std::size_t head = static_cast<std::size_t>(task.head);
  alignas(64) float means[kMeans * Dim];
  const float* centre = nullptr;
  if (format.centre != 0) {
    auto* stored = reinterpret_cast<std::int8_t*>(task.row + layout.means(head));
    std::uint8_t* scales = task.row + layout.mean_scales(head);
    for (int half = 0; half < kMeans; ++half)
      if (!half_mean<Simd>(task, Dim, half, stored + half * Dim, scales + 2 * half, means + half * Dim)) return false;
    centre = means;
  }
  const FoldSide key{format.key, format.key_signs + head * Dim, task.keys, task.key_stride, centre, task.row + layout.key_codes(head),
                     task.row + layout.key_scales(head), task.row + layout.key_unit(head), pack_keys};
  const FoldSide value{format.value, format.value_signs + head * Dim, task.values, task.value_stride, nullptr,
                       task.row + layout.value_codes(head), task.row + layout.value_scales(head), task.row + layout.value_unit(head),
                       pack_values};
  return fold_side<Simd, Dim>(task, key) && fold_side<Simd, Dim>(task, value);
}

template <class Simd>
bool fold(const FoldTask& task) {
  if (task.format->head_dim == 64) return fold_head<Simd, 64>(task);
  if (task.format->head_dim == 96) return fold_head<Simd, 96>(task);
  if (task.format->head_dim == 128) return fold_head<Simd, 128>(task);
  return fold_head<Simd, 256>(task);
}

template <class Simd, int Dim>
void hadamard_of(float* data) {
  Vector<Simd, Dim> v;
  for (int i = 0; i < Vector<Simd, Dim>::kParts; ++i) v.part[i] = Simd::load(data + i * Simd::kWidth);
  v.hadamard();
  for (int i = 0; i < Vector<Simd, Dim>::kParts; ++i) Simd::store(data + i * Simd::kWidth, v.part[i]);
}

template <class Simd>
void hadamard(float* data, int dim) {
  if (dim == 64) return hadamard_of<Simd, 64>(data);
  if (dim == 96) return hadamard_of<Simd, 96>(data);
  if (dim == 128) return hadamard_of<Simd, 128>(data);
  hadamard_of<Simd, 256>(data);
}

}  // namespace
}  // namespace kvfold
#endif
