// Sixteen lanes with AVX-512 F/BW/VL/DQ, VBMI for table lookups and VNNI for integer dot products.
//
// Levels are looked up with a bias of 64 so that they are unsigned, as vpdpbusd wants; the product's excess 64 * sum(x) is taken off
// as an integer.
#ifndef KVFOLD_SIMD_AVX512_H
#define KVFOLD_SIMD_AVX512_H

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "level.h"
#include "planes.h"
#include "unroll.h"

namespace kvfold {
namespace {

struct SimdAvx512 {
  static constexpr int kWidth = 16;
  static constexpr int kBytes = 64;
  static constexpr int kBias = 64;
  static constexpr bool kMergesPairs = false;
  using Float = __m512;
  using Int = __m512i;
  using Codes = __m512i;

  static Float load(const float* p) { return _mm512_loadu_ps(p); }
  static Float load_half(const std::uint16_t* p) { return _mm512_cvtph_ps(load_256(p)); }
  static Float load_bfloat16(const std::uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_256(p)), 16));
  }
  static Float load_int8(const std::int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static Float load_int32(const std::int32_t* p) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(p)); }
  static void store(float* p, Float a) { _mm512_storeu_ps(p, a); }
  static Float set(float x) { return _mm512_set1_ps(x); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
  // 2^x = 2^floor(x) * p(x - floor(x)); p has degree 4 and relative error 4e-6.
  static Float exp2(Float a) {
    const Float fraction = _mm512_reduce_ps(a, _MM_FROUND_TO_NEG_INF);
    Float p = _mm512_set1_ps(1.3697664e-2f);
    p = _mm512_fmadd_ps(p, fraction, _mm512_set1_ps(5.1690355e-2f));
    p = _mm512_fmadd_ps(p, fraction, _mm512_set1_ps(2.4163844e-1f));
    p = _mm512_fmadd_ps(p, fraction, _mm512_set1_ps(6.9296869e-1f));
    p = _mm512_fmadd_ps(p, fraction, _mm512_set1_ps(1.0000037f));
    return _mm512_scalef_ps(p, a);
  }
  static float reduce_max(Float a) { return _mm512_reduce_max_ps(a); }
  static float reduce_add(Float a) {  // the halving tree
    a = _mm512_add_ps(a, swap<8>(a));
    a = _mm512_add_ps(a, swap<4>(a));
    a = _mm512_add_ps(a, swap<2>(a));
    return _mm512_cvtss_f32(_mm512_add_ps(a, swap<1>(a)));
  }

  static Int round(Float a) { return _mm512_cvtps_epi32(a); }
  static Int zero_int() { return _mm512_setzero_si512(); }
  static Int add_int(Int a, Int b) { return _mm512_add_epi32(a, b); }
  static Int load_ints(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
  static std::int32_t reduce_add_int(Int a) { return _mm512_reduce_add_epi32(a); }

  // Lane i <- lane i ^ Half.
  template <int Half>
  static Float swap(Float a) {
    if constexpr (Half == 1) return _mm512_permute_ps(a, 0xB1);
    if constexpr (Half == 2) return _mm512_permute_ps(a, 0x4E);
    if constexpr (Half == 4) return _mm512_shuffle_f32x4(a, a, 0xB1);
    return _mm512_shuffle_f32x4(a, a, 0x4E);
  }
  template <int Half>
  static Float butterfly(Float a) {
    constexpr __mmask16 kUpper = Half == 1 ? 0xAAAA : Half == 2 ? 0xCCCC : Half == 4 ? 0xF0F0 : 0xFF00;
    const Float other = swap<Half>(a);
    return _mm512_mask_sub_ps(_mm512_add_ps(a, other), kUpper, other, a);
  }
  template <int Bits>
  static Int search(Float a, const float* thresholds) {
    const Float table = _mm512_loadu_ps(thresholds);
    Int code = _mm512_setzero_si512();
    for (int step = 1 << (Bits - 1); step >= 1; step /= 2) {
      const Float threshold = _mm512_permutexvar_ps(_mm512_add_epi32(code, _mm512_set1_epi32(step - 1)), table);
      code = _mm512_mask_or_epi32(code, _mm512_cmp_ps_mask(a, threshold, _CMP_GT_OQ), code, _mm512_set1_epi32(step));
    }
    return code;
  }
  static Float lookup_level(Int code, const std::int8_t* levels) {
    return _mm512_permutexvar_ps(code, load_int8(levels));
  }
  static void store_codes(std::uint8_t* p, Int code) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(code));
  }

  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
  static void prefetch_codes(const std::uint8_t* p) {
    _mm_prefetch(reinterpret_cast<const char*>(p) + kPrefetchBytes, _MM_HINT_T0);
  }
  static Codes load_codes(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
  template <int Shift>
  static Codes shift(Codes a) {
    if constexpr (Shift == 0) return a;
    return _mm512_srli_epi16(a, Shift);
  }
  template <int LowShift, int HighBit>
  static Codes merge(Codes low, Codes high) {
    if constexpr (HighBit > 2) high = _mm512_srli_epi16(high, HighBit - 2);
    if constexpr (HighBit < 2) high = _mm512_slli_epi16(high, 2 - HighBit);
    constexpr int kSelect = 0xCA;  // first ? second : third
    return _mm512_ternarylogic_epi64(_mm512_set1_epi8(3), shift<LowShift>(low), high, kSelect);
  }
  // vpermb ignores the two highest bits of an index and the table repeats below them: no masking.
  static Codes lookup(Codes index, Codes table) { return _mm512_permutexvar_epi8(index, table); }

  // 256 * high + low of four integers -> [high x4][low x4].
  static void expand(const std::int16_t* grid, std::uint8_t* operand) {
    for (int i = 0; i < 4; ++i) {
      operand[i] = static_cast<std::uint8_t>((grid[i] + 128) >> 8);
      operand[4 + i] = static_cast<std::uint8_t>(grid[i]);
    }
  }
  static void store_quads(Int grid, std::uint8_t* operand) {
    const Int high = _mm512_add_epi32(grid, _mm512_set1_epi32(128));  // its second byte
    const Int both = _mm512_mask_blend_epi8(0x2222222222222222ull, grid, high);
    const __m512i packed = _mm512_permutexvar_epi8(_mm512_load_si512(kQuads), both);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(operand), _mm512_castsi512_si256(packed));
  }
  alignas(64) static constexpr std::uint8_t kQuads[64] = {1,  5,  9,  13, 0,  4,  8,  12, 17, 21, 25, 29, 16, 20, 24, 28,
                                                          33, 37, 41, 45, 32, 36, 40, 44, 49, 53, 57, 61, 48, 52, 56, 60};

  template <int Bits, int Quads, int Rows>
  static void dot(const Parts& parts, const std::uint8_t* operand, const std::int32_t* sum, const std::uint8_t* table,
                  std::int32_t* out) {
    const Codes levels = _mm512_load_si512(table);
    // Indices known when compiling: compilers keep arrays that an assembly statement sees in memory otherwise.
    Int high[Rows], low[Rows];
    unroll<Rows>([&](auto r) {
      high[r] = _mm512_setzero_si512();
      low[r] = _mm512_set1_epi32(-kBias * sum[r]);
    });
    for (int part = 0; part < parts.count; ++part, operand += 8 * Quads)
      walk<SimdAvx512, Bits, Quads>(parts.codes[part], 0, [&](int quad, Codes codes) {
        const Codes level = Bits == kLevelBits ? codes : lookup(codes, levels);
        const std::uint8_t* x = operand + 8 * quad;
        unroll<Rows>([&](auto r) {
          high[r] = multiply(high[r], level, x + r * kOperandRow);
          low[r] = multiply(low[r], level, x + r * kOperandRow + 4);
        });
      });
    unroll<Rows>([&](auto r) {
      _mm512_store_si512(out + r * kLanes, _mm512_add_epi32(_mm512_slli_epi32(high[r], 8), low[r]));
    });
  }

 private:
  static __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  // sum += levels x the four signed bytes at p. As one instruction, which compilers make two of: half as many in flight reach further.
  static Int multiply(Int sum, Codes level, const std::uint8_t* p) {
    struct Bytes { std::uint8_t x[4]; };
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(level), "m"(*reinterpret_cast<const Bytes*>(p)));
    return sum;
  }
};

}  // namespace
}  // namespace kvfold
#endif
