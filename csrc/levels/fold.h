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

// The 3 x 3 Hartley matrix cas(2 pi i j / 3) across three blocks of `count` rows, summed from block 0 upwards.
template <class Simd>
void hartley_rows(typename Simd::Float* x, int count) {
  const auto c = Simd::set(0.36602540378443865f), d = Simd::set(-1.3660254037844386f);
  for (int i = 0; i < count; ++i) {
    const auto a = x[i], b = x[i + count], e = x[i + 2 * count];
    x[i] = Simd::add(Simd::add(a, b), e);
    x[i + count] = Simd::add(Simd::add(a, Simd::mul(c, b)), Simd::mul(d, e));
    x[i + 2 * count] = Simd::add(Simd::add(a, Simd::mul(d, b)), Simd::mul(c, e));
  }
}

// One vector, kWidth coordinates to a part.
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
    if constexpr (kParts == 3 * kBlock) hartley_rows<Simd>(part, kBlock);
  }
};

// Butterflies of distances 1, 2, ... Count / 2 among Count registers.
template <class Simd, int Count, int Half = 1>
KVF_INLINE void butterflies(typename Simd::Float* x) {
  if constexpr (Half < Count) {
    unroll<Count / 2>([&](auto index) KVF_INLINE_LAMBDA {
      constexpr int n = decltype(index)::value, i = n / Half * 2 * Half + n % Half;
      const auto a = x[i], b = x[i + Half];
      x[i] = Simd::add(a, b);
      x[i + Half] = Simd::sub(a, b);
    });
    butterflies<Simd, Count, 2 * Half>(x);
  }
}

// Sums for the coordinates of a quad.
template <class Simd>
struct Sums {
  typename Simd::Float of[4];
  KVF_INLINE void add(const Sums& other) {
    for (int i = 0; i < 4; ++i) of[i] = Simd::add(of[i], other.of[i]);
  }
};

// One side of a head as it lies in memory and is to lie in the row.
struct FoldSide {
  const kvf_side& side;
  const float* signs;
  const void* data;
  std::int64_t stride;
  const float* means;  // null: none
  std::uint8_t *codes, *scales, *unit;
  bool keys;
};

// kWidth vectors side by side: y[j] holds coordinate j of all of them.
template <class Simd, int Dim>
class Vectors {
  using Float = typename Simd::Float;
  using Int = typename Simd::Int;
  static constexpr int kWidth = Simd::kWidth, kQuads = Dim / 4;
  static constexpr int kBlock = Dim & -Dim;  // coordinates of a power of two
  static constexpr int kColumns = 16;        // a tree's last sums are over those

 public:
  // Words of four codes.
  struct Codes {
    Int words[kQuads];
    Float dot, square;  // <u, L>, <L, L>
  };

  // H (s * (x - mean)) of the tokens from `first` on.
  void load(const FoldSide& s, int dtype, int first) {
    if (dtype == KVF_FLOAT32) return load_of<KVF_FLOAT32>(s, first);
    dtype == KVF_BFLOAT16 ? load_of<KVF_BFLOAT16>(s, first) : load_of<KVF_FLOAT16>(s, first);
  }

  Float square() const { return tree(Squares{y}); }

  // Codes of `factor` times u, which is `inverse` times the vectors.
  template <int Bits>
  void encode(const typename Simd::template Grid<Bits>& grid, Float inverse, float factor, Codes& out) const {
    out.square = Simd::set(0.0f);
    out.dot = tree(Nearest<Bits>{y, grid, inverse, Simd::set(factor), out.words, out.square});
  }

 private:
  struct Squares {
    const Float* y;
    KVF_INLINE Sums<Simd> operator()(int j) const {
      Sums<Simd> out;
      for (int i = 0; i < 4; ++i) out.of[i] = Simd::mul(y[j + i], y[j + i]);
      return out;
    }
  };

  template <int Bits>
  struct Nearest {
    const Float* y;
    const typename Simd::template Grid<Bits>& grid;
    const Float inverse, factor;
    Int* words;
    Float& square;  // of levels: whole numbers below 2^24, exact in any order
    KVF_INLINE Sums<Simd> operator()(int j) const {
      Sums<Simd> dots;
      Int codes[4];
      unroll<4>([&](auto index) KVF_INLINE_LAMBDA {
        constexpr int i = decltype(index)::value;
        const Float u = Simd::mul(y[j + i], inverse);
        codes[i] = grid.nearest(Simd::mul(u, factor));
        const Float level = grid.level(codes[i]);
        dots.of[i] = Simd::mul(u, level);
        square = Simd::fma(level, level, square);
      });
      words[j / 4] = Simd::join(codes[0], codes[1], codes[2], codes[3]);
      return dots;
    }
  };

  // Asks for the tokens after these too.
  template <int kDtype>
  void load_of(const FoldSide& s, int first) {
    const float* mean = s.means == nullptr ? nullptr : s.means + first / kMeanTokens * Dim;
    for (int j = 0; j < Dim; j += kWidth) {
      Float rows[kWidth];
      const Float sign = Simd::load(s.signs + j), centre = mean == nullptr ? Simd::set(0.0f) : Simd::load(mean + j);
      unroll<kWidth>([&](auto index) KVF_INLINE_LAMBDA {
        constexpr int t = decltype(index)::value;
        const std::int64_t at = (first + t) * s.stride + j;
        Simd::prefetch(static_cast<const char*>(s.data) + (at + kWidth * s.stride) * (kDtype == KVF_FLOAT32 ? 4 : 2));
        auto x = load_as<Simd>(s.data, at, kDtype);
        if (mean != nullptr) x = Simd::sub(x, centre);
        rows[t] = Simd::mul(x, sign);
      });
      Simd::transpose(rows);
      butterflies<Simd, kWidth>(rows);
      unroll<kWidth>([&](auto i) KVF_INLINE_LAMBDA { y[j + i] = rows[i]; });
    }
    distant<kWidth>();
    if constexpr (Dim == 3 * kBlock) hartley_rows<Simd>(y, kBlock);
  }

  // Butterflies of distances Half and more, eight coordinates at a time.
  template <int Half>
  void distant() {
    if constexpr (Half < kBlock) {
      constexpr int kRadix = kBlock / Half < 8 ? kBlock / Half : 8;
      for (int first = 0; first < Dim; first += kRadix * Half)
        for (int j = first; j < first + Half; ++j) {
          Float x[kRadix];
          unroll<kRadix>([&](auto i) KVF_INLINE_LAMBDA { x[i] = y[j + i * Half]; });
          butterflies<Simd, kRadix>(x);
          unroll<kRadix>([&](auto i) KVF_INLINE_LAMBDA { y[j + i * Half] = x[i]; });
        }
      distant<kRadix * Half>();
    }
  }

  // The sum over all coordinates of what term(j) has for j to j + 3, along the halving tree.
  template <class Term>
  KVF_INLINE Float tree(const Term& term) const {
    Float column[kColumns];
    for (int j = 0; j < kColumns; j += 4) {
      const auto sums = halves<1, 0>(term, j);
      for (int i = 0; i < 4; ++i) column[j + i] = sums.of[i];
    }
    for (int n = kColumns / 2; n >= 1; n /= 2)
      for (int j = 0; j < n; ++j) column[j] = Simd::add(column[j], column[j + n]);
    return column[0];
  }

  // The sum over rows m, m + Height, m + 2 Height ... of kColumns coordinates: first half plus second half, as if padded with zeros to a
  // power of two.
  template <int Height, int M, class Term>
  static KVF_INLINE Sums<Simd> halves(const Term& term, int j) {
    if constexpr (Height >= Dim / kColumns) {
      return term(M * kColumns + j);
    } else {
      auto sum = halves<2 * Height, M>(term, j);
      if constexpr (M + Height < Dim / kColumns) sum.add(halves<2 * Height, M + Height>(term, j));
      return sum;
    }
  }

  Float y[Dim];
};

// Keeps what was tried for the vectors that it suits better.
template <class Simd, int Dim>
void keep_better(const typename Vectors<Simd, Dim>::Codes& tried, typename Vectors<Simd, Dim>::Codes& best) {
  float dots[2][Simd::kWidth], squares[2][Simd::kWidth];
  Simd::store(dots[0], best.dot);
  Simd::store(squares[0], best.square);
  Simd::store(dots[1], tried.dot);
  Simd::store(squares[1], tried.square);
  std::uint32_t mask[Simd::kWidth], words[2][Simd::kWidth];
  for (int t = 0; t < Simd::kWidth; ++t) {
    const bool better = Fit{dots[1][t], squares[1][t]}.gain() > Fit{dots[0][t], squares[0][t]}.gain();
    mask[t] = better ? ~0u : 0u;
    if (!better) continue;
    dots[0][t] = dots[1][t];
    squares[0][t] = squares[1][t];
  }
  best.dot = Simd::load(dots[0]);
  best.square = Simd::load(squares[0]);
  for (int quad = 0; quad < Dim / 4; ++quad) {
    std::memcpy(words[0], &best.words[quad], sizeof words[0]);
    std::memcpy(words[1], &tried.words[quad], sizeof words[1]);
    for (int t = 0; t < Simd::kWidth; ++t) words[0][t] = (words[1][t] & mask[t]) | (words[0][t] & ~mask[t]);
    std::memcpy(&best.words[quad], words[0], sizeof words[0]);
  }
}

// kWidth vectors from `first` on -> their codes as pack_groups() takes them, and their scales. False if one is not a finite float16.
template <class Simd, int Dim, int Bits>
bool encode(const FoldSide& s, const typename Simd::template Grid<Bits>& grid, int dtype, int first, std::uint8_t* codes) {
  constexpr float kFactors[3] = {1.0f, 0.9f, 1.1f};  // grids of the codebook; the first with the largest gain wins
  constexpr int kWidth = Simd::kWidth;
  Vectors<Simd, Dim> vectors;
  vectors.load(s, dtype, first);
  alignas(64) float radius[kWidth], inverse[kWidth], dot[kWidth], square[kWidth];
  Simd::store(radius, vectors.square());
  for (int t = 0; t < kWidth; ++t) {
    radius[t] = std::sqrt(radius[t] / Dim);
    inverse[t] = radius[t] > 0.0f ? 1.0f / radius[t] : 0.0f;
  }
  typename Vectors<Simd, Dim>::Codes best, tried;
  vectors.template encode<Bits>(grid, Simd::load(inverse), kFactors[0], best);
  for (int i = 1; i < s.side.searches; ++i) {
    vectors.template encode<Bits>(grid, Simd::load(inverse), kFactors[i], tried);
    keep_better<Simd, Dim>(tried, best);
  }
  Simd::store(dot, best.dot);
  Simd::store(square, best.square);
  const int rule = s.side.scale_rule;
  const float step = s.side.step;
  std::uint16_t scales[kWidth];
  unsigned infinite = 0;
  for (int t = 0; t < kWidth; ++t) {
    const std::uint16_t scale = float_to_half(scale_of(rule, step, Dim, radius[t], {dot[t], square[t]}));
    scales[t] = radius[t] == 0.0f ? std::uint16_t{0} : scale;
    infinite |= (scales[t] & 0x7c00u) == 0x7c00u ? 1u : 0u;
  }
  std::memcpy(s.scales + 2 * first, scales, sizeof scales);
  if (s.keys) {
    std::uint8_t* to = codes + first / kLanes * kLanes * Dim + first % kLanes * 4;
    for (int quad = 0; quad < Dim / 4; ++quad) Simd::store_ints(to + 64 * quad, best.words[quad]);
  } else {
    std::uint8_t* to = codes + first / 4 * 64;
    for (int quad = 0; quad < Dim / 4; ++quad)
      Simd::store_turned(to + quad / 4 * kLanes * kPageTokens + quad % 4 * 16, best.words[quad]);
  }
  return infinite == 0;
}

template <class Simd, int Dim, int Bits>
bool encode_page(const FoldSide& s, int dtype) {
  alignas(64) std::uint8_t codes[kPageTokens * Dim];
  const typename Simd::template Grid<Bits> grid(s.side);
  bool finite = true;
  for (int first = 0; first < kPageTokens; first += Simd::kWidth) finite &= encode<Simd, Dim, Bits>(s, grid, dtype, first, codes);
  if (s.keys)
    pack_groups(codes, kTokenGroups, Dim / 4, Bits, s.codes);
  else
    pack_groups(codes, Dim / kLanes, kTokenQuads, Bits, s.codes);
  return finite;
}

// Divides sums by `count` and quantizes the mean to int8; `mean` becomes the dequantized one.
inline bool quantize_mean(float* mean, int dim, float count, std::int8_t* codes, std::uint8_t* scale_bytes) {
  std::uint32_t top = 0;  // of magnitudes, whose bits are in their order: infinity and NaN come last
  for (int j = 0; j < dim; ++j) {
    mean[j] = mean[j] / count;
    const std::uint32_t magnitude = bits_of(mean[j]) & 0x7fffffffu;
    top = magnitude > top ? magnitude : top;
  }
  if (!(float_of(top) <= 3.4e38f)) return false;
  const std::uint16_t half = float_to_half(float_of(top) / 127.0f);
  const float scale = half_to_float(half);
  std::memcpy(scale_bytes, &half, sizeof half);
  for (int j = 0; j < dim; ++j) {
    float code = scale == 0.0f ? 0.0f : nearest_integer(mean[j] / scale);
    code = code > 127.0f ? 127.0f : code;
    code = code < -127.0f ? -127.0f : code;
    codes[j] = static_cast<std::int8_t>(static_cast<std::int32_t>(code));
    mean[j] = scale * code;
  }
  return (half & 0x7c00u) != 0x7c00u;
}

// Coordinates j, j + 1 ... of half a page's keys.
template <class Simd>
struct KeyRow {
  const FoldTask& task;
  int first, j, absent;
  KVF_INLINE typename Simd::Float operator()(int t) const {
    const std::int64_t at = (first + t) * task.key_stride + j;
    Simd::prefetch(static_cast<const char*>(task.keys) + (at + kMeanTokens * task.key_stride) * (task.dtype == KVF_FLOAT32 ? 4 : 2));
    return t < absent ? Simd::set(0.0f) : load_as<Simd>(task.keys, at, task.dtype);
  }
};

// The sum of tokens t, t + Step, t + 2 Step ... below kMeanTokens: first half plus second half.
template <class Simd, int Step, class Term>
KVF_INLINE typename Simd::Float token_tree(const Term& term, int t) {
  if constexpr (Step >= kMeanTokens)
    return term(t);
  else
    return Simd::add(token_tree<Simd, 2 * Step>(term, t), token_tree<Simd, 2 * Step>(term, t + Step));
}

// Mean key of tokens [64 half, 64 half + 64) by the halving tree over tokens, the page's skipped ones counting as absent.
template <class Simd>
bool half_mean(const FoldTask& task, int dim, int half, std::int8_t* codes, std::uint8_t* scale_bytes, float* mean) {
  constexpr int kStep = 8;
  const int first = half * kMeanTokens, absent = task.skipped - first;
  const int count = absent <= 0 ? kMeanTokens : absent < kMeanTokens ? kMeanTokens - absent : 1;
  for (int j = 0; j < dim; j += Simd::kWidth) {
    const KeyRow<Simd> row{task, first, j, absent};
    typename Simd::Float sum[kStep];
    for (int t = 0; t < kStep; ++t) sum[t] = token_tree<Simd, kStep>(row, t);
    for (int n = kStep / 2; n >= 1; n /= 2)
      for (int t = 0; t < n; ++t) sum[t] = Simd::add(sum[t], sum[t + n]);
    Simd::store(mean + j, sum[0]);
  }
  return quantize_mean(mean, dim, static_cast<float>(count), codes, scale_bytes);
}

template <class Simd, int Dim>
bool fold_side(const FoldTask& task, const FoldSide& s) {
  if (s.side.trellis != nullptr)
    return task.trellis->fold(
        {&s.side, s.signs, s.means, s.data, s.stride, task.dtype, Dim, s.keys, task.skipped, s.codes, s.scales, s.unit});
  if (s.side.bits == 4) return encode_page<Simd, Dim, 4>(s, task.dtype);
  return s.side.bits == 3 ? encode_page<Simd, Dim, 3>(s, task.dtype) : encode_page<Simd, Dim, 2>(s, task.dtype);
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
                     task.row + layout.key_scales(head), task.row + layout.key_unit(head), true};
  const FoldSide value{format.value, format.value_signs + head * Dim, task.values, task.value_stride, nullptr,
                       task.row + layout.value_codes(head), task.row + layout.value_scales(head), task.row + layout.value_unit(head),
                       false};
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
