// Eight lanes with AVX2, FMA and F16C. `Dot` is the integer dot product: Avx2Dot below, or 256-bit VNNI in avx_vnni.cpp.
//
// Levels carry a bias of 64 (see simd_avx512.h): unsigned bytes split into even and odd 16-bit integers with one operation each.
#ifndef KVFOLD_SIMD_AVX2_H
#define KVFOLD_SIMD_AVX2_H

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "level.h"
#include "planes.h"
#include "unroll.h"

namespace kvfold {
namespace {

// 16-bit multiply-add: exact for the whole 16-bit grid, four coordinates in two instructions.
struct Avx2Dot {
  using Sum = __m256i;
  struct Operand { __m256i even, odd; };
  static constexpr int kRows = 8;  // per pass over the codes
  // Whether codes of that many bits become levels before the rows are multiplied: looked up in the same loop they left no register free.
  static constexpr bool unpacks(int bits, int rows) { return rows > 4 || (rows > 2 && bits < 4); }
  static Sum zero() { return _mm256_setzero_si256(); }
  static Operand split(__m256i level) {
    return {_mm256_and_si256(level, _mm256_set1_epi16(0xFF)), _mm256_srli_epi16(level, 8)};
  }
  static Sum step(Sum sum, Operand level, const std::uint8_t* x) {
    const __m256i even = _mm256_madd_epi16(level.even, broadcast(x)), odd = _mm256_madd_epi16(level.odd, broadcast(x + 4));
    sum = _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
    __asm__("" : "+x"(sum));  // in a register, in this order: left alone, compilers mix quads and run out of registers
    return sum;
  }
  static __m256i value(Sum sum) { return sum; }
  // Four integers -> [0, 2][1, 3], as int16.
  static void expand(const std::int16_t* grid, std::uint8_t* operand) {
    const std::int16_t order[4] = {grid[0], grid[2], grid[1], grid[3]};
    std::memcpy(operand, order, sizeof order);
  }
  static __m256i quads(__m256i grid) {
    return _mm256_shuffle_epi8(grid, _mm256_setr_epi8(0, 1, 8, 9, 4, 5, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1, 0, 1, 8, 9, 4, 5,
                                                      12, 13, -1, -1, -1, -1, -1, -1, -1, -1));
  }
  static __m256i broadcast(const std::uint8_t* p) {
    std::int32_t word;
    std::memcpy(&word, p, sizeof word);
    return _mm256_set1_epi32(word);
  }
};

template <class Dot>
struct SimdAvx2 : OneGroup {
  static constexpr int kWidth = 8;
  static constexpr int kBytes = 32;
  static constexpr int kBias = 64;
  static constexpr bool kMergesPairs = true;
  using Float = __m256;
  using Int = __m256i;
  using Codes = __m256i;

  static Float load(const float* p) { return _mm256_loadu_ps(p); }
  static Float load_half(const std::uint16_t* p) { return _mm256_cvtph_ps(load_128(p)); }
  static Float load_bfloat16(const std::uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_128(p)), 16));
  }
  static Float load_int8(const std::int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static Float load_int32(const std::int32_t* p) { return _mm256_cvtepi32_ps(load_256(p)); }
  static void store(float* p, Float a) { _mm256_storeu_ps(p, a); }
  static Float set(float x) { return _mm256_set1_ps(x); }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
  // 2^x = 2^n * p(x - n), n nearest; below -126 the result stays at 2^-126. p has degree 5 and relative error 2e-7.
  static Float exp2(Float a) {
    a = _mm256_max_ps(a, _mm256_set1_ps(-126.0f));
    const Float whole = _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), fraction = _mm256_sub_ps(a, whole);
    Float p = _mm256_set1_ps(1.3333558e-3f);
    p = _mm256_fmadd_ps(p, fraction, _mm256_set1_ps(9.6181291e-3f));
    p = _mm256_fmadd_ps(p, fraction, _mm256_set1_ps(5.5504109e-2f));
    p = _mm256_fmadd_ps(p, fraction, _mm256_set1_ps(2.4022651e-1f));
    p = _mm256_fmadd_ps(p, fraction, _mm256_set1_ps(6.9314718e-1f));
    p = _mm256_fmadd_ps(p, fraction, _mm256_set1_ps(1.0f));
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23)));
  }
  static float reduce_max(Float a) {
    a = _mm256_max_ps(a, swap<4>(a));
    a = _mm256_max_ps(a, swap<2>(a));
    return _mm256_cvtss_f32(_mm256_max_ps(a, swap<1>(a)));
  }
  static float reduce_add(Float a) {  // the halving tree
    a = _mm256_add_ps(a, swap<4>(a));
    a = _mm256_add_ps(a, swap<2>(a));
    return _mm256_cvtss_f32(_mm256_add_ps(a, swap<1>(a)));
  }

  static Int round(Float a) { return _mm256_cvtps_epi32(a); }
  static Int zero_int() { return _mm256_setzero_si256(); }
  static Int add_int(Int a, Int b) { return _mm256_add_epi32(a, b); }
  static Int load_ints(const std::uint8_t* p) { return load_256(p); }
  static std::int32_t reduce_add_int(Int a) {
    const __m128i half = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    const __m128i pair = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(pair, _mm_shuffle_epi32(pair, 0xB1)));
  }

  template <int Half>
  static Float swap(Float a) {
    if constexpr (Half == 1) return _mm256_permute_ps(a, 0xB1);
    if constexpr (Half == 2) return _mm256_permute_ps(a, 0x4E);
    return _mm256_permute2f128_ps(a, a, 1);
  }
  template <int Half>
  static Float butterfly(Float a) {
    constexpr int kUpper = Half == 1 ? 0xAA : Half == 2 ? 0xCC : 0xF0;
    const Float other = swap<Half>(a);
    return _mm256_blend_ps(_mm256_add_ps(a, other), _mm256_sub_ps(other, a), kUpper);
  }
  // Rows of a matrix -> its columns.
  static KVF_INLINE void transpose(Float* m) {
    Float t[8];
    unroll<4>([&](auto i) KVF_INLINE_LAMBDA {
      t[2 * i] = _mm256_unpacklo_ps(m[2 * i], m[2 * i + 1]);
      t[2 * i + 1] = _mm256_unpackhi_ps(m[2 * i], m[2 * i + 1]);
    });
    unroll<2>([&](auto half) KVF_INLINE_LAMBDA {  // m[4 i + k]: column k of both halves, of rows 4 i to 4 i + 3
      constexpr int i = 4 * decltype(half)::value;
      m[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      m[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
      m[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      m[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
    });
    unroll<4>([&](auto column) KVF_INLINE_LAMBDA {
      constexpr int k = decltype(column)::value;
      const Float low = m[k], high = m[k + 4];
      m[k] = _mm256_permute2f128_ps(low, high, 0x20);
      m[k + 4] = _mm256_permute2f128_ps(low, high, 0x31);
    });
  }

  // A codebook: how many thresholds lie strictly below a number, by halving them, and the level of that code.
  template <int Bits>
  class Grid {
   public:
    explicit Grid(const kvf_side& side) : levels(_mm256_broadcastsi128_si256(load_128(side.levels))) {
      unroll<Bits>([&](auto index) KVF_INLINE_LAMBDA {  // after `step` comparisons the code's highest bits are known: the threshold in the middle of the rest
        constexpr int step = decltype(index)::value;
        alignas(32) float of_code[8] = {};
        for (int code = 0; code < 1 << step; ++code) of_code[code] = side.thresholds[(2 * code + 1) * (1 << (Bits - 1 - step)) - 1];
        middles[step] = step == 0 ? _mm256_set1_ps(of_code[0]) : _mm256_load_ps(of_code);
      });
    }
    KVF_INLINE Int nearest(Float a) const {
      Int code = _mm256_srli_epi32(above(a, middles[0]), 31);
      unroll<Bits - 1>([&](auto step) KVF_INLINE_LAMBDA {
        const Float middle = _mm256_permutevar8x32_ps(middles[decltype(step)::value + 1], code);
        code = _mm256_sub_epi32(_mm256_add_epi32(code, code), above(a, middle));  // a true comparison is -1
      });
      return code;
    }
    KVF_INLINE Float level(Int code) const {
      const __m256i bytes = _mm256_shuffle_epi8(levels, code);
      return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(bytes, 24), 24));
    }

   private:
    static Int above(Float a, Float b) { return _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
    Int levels;
    Float middles[Bits];
  };

  // Codes of four coordinates -> bytes of one word per lane.
  static Int join(Int a, Int b, Int c, Int d) {
    const Int low = _mm256_or_si256(a, _mm256_slli_epi32(b, 8)), high = _mm256_or_si256(c, _mm256_slli_epi32(d, 8));
    return _mm256_or_si256(low, _mm256_slli_epi32(high, 16));
  }
  static void store_ints(std::uint8_t* p, Int a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
  // 4 x 4 bytes of every four lanes turned, for four lanes sixteen bytes of a line.
  static void store_turned(std::uint8_t* p, Int a) {
    const __m128i turn = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    a = _mm256_shuffle_epi8(a, _mm256_broadcastsi128_si256(turn));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(a));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 64), _mm256_extracti128_si256(a, 1));
  }

  static KVF_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
  static KVF_INLINE void prefetch_early(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
  static KVF_INLINE void prefetch_codes(const std::uint8_t* p) {
    _mm_prefetch(reinterpret_cast<const char*>(p) + kPrefetchBytes, _MM_HINT_T0);
  }
  static Codes load_codes(const std::uint8_t* p) { return load_256(p); }
  template <int Shift>
  static Codes shift(Codes a) {
    if constexpr (Shift == 0) return a;
    return _mm256_srli_epi16(a, Shift);
  }
  template <int LowShift, int HighBit>
  static Codes merge(Codes low, Codes high) {
    if constexpr (HighBit > 2) high = _mm256_srli_epi16(high, HighBit - 2);
    if constexpr (HighBit < 2) high = _mm256_slli_epi16(high, 2 - HighBit);
    return _mm256_or_si256(_mm256_and_si256(shift<LowShift>(low), _mm256_set1_epi8(0x33)),
                           _mm256_and_si256(high, _mm256_set1_epi8(0x44)));
  }
  static Codes lookup(Codes index, Codes table) {
    return _mm256_shuffle_epi8(table, _mm256_and_si256(index, _mm256_set1_epi8(15)));
  }

  static void expand(const std::int16_t* grid, std::uint8_t* operand) { Dot::expand(grid, operand); }
  static void store_quads(Int grid, std::uint8_t* operand) {
    const __m256i packed = Dot::quads(grid);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(operand), _mm256_castsi256_si128(packed));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(operand + 8), _mm256_extracti128_si256(packed, 1));
  }

  template <int Bits, int Quads, int Rows>
  static void dot(const Parts& parts, const std::uint8_t* operand, const std::int32_t* sum, const std::uint8_t* table,
                  std::int32_t* out) {
    if constexpr (Bits != kLevelBits && Dot::unpacks(Bits, Rows))
      return dot_unpacked<Bits, Quads, Rows>(parts, operand, sum, table, out);
    constexpr int kRows = Rows < Dot::kRows ? Rows : Dot::kRows;
    for (int first = 0; first < Rows; first += kRows)
      unroll<2>([&](auto half) {
        half_line<Bits, Quads, kRows, decltype(half)::value>(parts, operand + first * kOperandRow, sum + first, table,
                                                             out + first * kLanes + 8 * half);
      });
  }

 private:
  // Levels first, into the first level cache: two short loops whose values all have registers.
  template <int Bits, int Quads, int Rows>
  static void dot_unpacked(const Parts& parts, const std::uint8_t* operand, const std::int32_t* sum, const std::uint8_t* table,
                           std::int32_t* out) {
    alignas(64) std::uint8_t unpacked[kBlockPages][Quads * 64];
    const Codes levels = load_256(table);
    for (int part = 0; part < parts.count; ++part)
      for (int half = 0; half < 2; ++half)
        walk<SimdAvx2, Bits, Quads>(parts.codes[part], half, [&](int quad, Codes codes) {
          _mm256_store_si256(reinterpret_cast<__m256i*>(unpacked[part] + 64 * quad + 32 * half), lookup(codes, levels));
        });
    dot<kLevelBits, Quads, Rows>({{unpacked[0], unpacked[1]}, {}, parts.count}, operand, sum, table, out);
  }

  template <int Bits, int Quads, int Rows, int Half>
  static void half_line(const Parts& parts, const std::uint8_t* operand, const std::int32_t* sum, const std::uint8_t* table,
                        std::int32_t* out) {
    const Codes levels = load_256(table);
    typename Dot::Sum sums[Rows];
    unroll<Rows>([&](auto r) { sums[r] = Dot::zero(); });
    for (int part = 0; part < parts.count; ++part, operand += 8 * Quads)
      walk<SimdAvx2, Bits, Quads>(parts.codes[part], Half, [&](int quad, Codes codes) {
        const auto level = Dot::split(Bits == kLevelBits ? codes : lookup(codes, levels));
        unroll<Rows>([&](auto r) { sums[r] = Dot::step(sums[r], level, operand + 8 * quad + r * kOperandRow); });
      });
    unroll<Rows>([&](auto r) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(out + r * kLanes),
                         _mm256_sub_epi32(Dot::value(sums[r]), _mm256_set1_epi32(kBias * sum[r])));
    });
  }
  static __m128i load_128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
};

}  // namespace
}  // namespace kvfold
#endif
