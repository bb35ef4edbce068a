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
#include "planes_avx512.h"
#include "unroll.h"

namespace kvfold {
namespace {

struct SimdAvx512 : PlacedTables {
  static constexpr int kWidth = 16;
  static constexpr int kBytes = 64;
  static constexpr int kBias = 64;
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
  // Rows of a matrix -> its columns.
  static KVF_INLINE void transpose(Float* m) {
    Float t[16];
    unroll<8>([&](auto i) KVF_INLINE_LAMBDA {
      t[2 * i] = _mm512_unpacklo_ps(m[2 * i], m[2 * i + 1]);
      t[2 * i + 1] = _mm512_unpackhi_ps(m[2 * i], m[2 * i + 1]);
    });
    unroll<4>([&](auto quad) KVF_INLINE_LAMBDA {  // m[4 i + k]: column k of every quarter, of rows 4 i to 4 i + 3
      constexpr int i = 4 * decltype(quad)::value;
      m[i] = unpack_pairs<0>(t[i], t[i + 2]);
      m[i + 1] = unpack_pairs<1>(t[i], t[i + 2]);
      m[i + 2] = unpack_pairs<0>(t[i + 1], t[i + 3]);
      m[i + 3] = unpack_pairs<1>(t[i + 1], t[i + 3]);
    });
    unroll<4>([&](auto column) KVF_INLINE_LAMBDA {
      constexpr int k = decltype(column)::value;
      const Float a = _mm512_shuffle_f32x4(m[k], m[k + 4], 0x88), b = _mm512_shuffle_f32x4(m[k], m[k + 4], 0xDD);
      const Float c = _mm512_shuffle_f32x4(m[k + 8], m[k + 12], 0x88), d = _mm512_shuffle_f32x4(m[k + 8], m[k + 12], 0xDD);
      m[k] = _mm512_shuffle_f32x4(a, c, 0x88);
      m[k + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
      m[k + 8] = _mm512_shuffle_f32x4(a, c, 0xDD);
      m[k + 12] = _mm512_shuffle_f32x4(b, d, 0xDD);
    });
  }

  // A codebook: how many thresholds lie strictly below a number, and the level of that code. A number falls into one of 31 cells of equal
  // width, by an instruction that never puts a larger number into a lower cell, whatever it rounds. If no cell has two thresholds, one
  // comparison within the cell decides; else thresholds are halved.
  template <int Bits>
  class Grid {
   public:
    explicit Grid(const kvf_side& side) : levels(load_int8(side.levels)) {
      constexpr int kCount = (1 << Bits) - 1;
      alignas(64) float all[16] = {};
      std::memcpy(all, side.thresholds, sizeof side.thresholds);
      thresholds = _mm512_load_ps(all);
      const float first = all[0] < 0 ? -all[0] : all[0], last = all[kCount - 1] < 0 ? -all[kCount - 1] : all[kCount - 1];
      const float top = (first > last ? first : last) + 1e-30f;
      clip = set(top);
      scale = set(15.0f / top);
      alignas(64) std::int32_t cells[16], base[32];
      alignas(64) float edge[32];
      _mm512_store_si512(cells, cell(thresholds));
      int below = 0;
      for (int c = 0; c < 32; ++c) {
        base[c] = below;
        edge[c] = 3e38f;
        const bool here = below < kCount && (cells[below] & 31) == c;
        if (here) edge[c] = all[below++];
      }
      single = below == kCount;
      for (int i = 0; i < 2; ++i) {
        bases[i] = _mm512_load_si512(base + 16 * i);
        edges[i] = _mm512_load_ps(edge + 16 * i);
      }
    }

    KVF_INLINE Int nearest(Float a) const {
      if (!single) return halved(a);
      const Int index = cell(a), code = _mm512_permutex2var_epi32(bases[0], index, bases[1]);
      const __mmask16 above = _mm512_cmp_ps_mask(a, _mm512_permutex2var_ps(edges[0], index, edges[1]), _CMP_GT_OQ);
      return _mm512_mask_sub_epi32(code, above, code, _mm512_set1_epi32(-1));
    }
    KVF_INLINE Float level(Int code) const { return _mm512_permutexvar_ps(code, levels); }

   private:
    // The five low bits count; the sum has no bits for fractions.
    Int cell(Float a) const {
      constexpr int kSmallerWithSignOfFirst = 2;
      const Float within = _mm512_range_ps(a, clip, kSmallerWithSignOfFirst);
      return _mm512_castps_si512(_mm512_fmadd_ps(within, scale, _mm512_set1_ps(12582912.0f + 16.0f)));
    }
    Int halved(Float a) const {
      Int code = _mm512_setzero_si512();
      for (int step = 1 << (Bits - 1); step >= 1; step /= 2) {
        const Float threshold = _mm512_permutexvar_ps(_mm512_add_epi32(code, _mm512_set1_epi32(step - 1)), thresholds);
        code = _mm512_mask_or_epi32(code, _mm512_cmp_ps_mask(a, threshold, _CMP_GT_OQ), code, _mm512_set1_epi32(step));
      }
      return code;
    }
    Float levels, thresholds, clip, scale, edges[2];
    Int bases[2];
    bool single;
  };

  // Codes of four coordinates -> bytes of one word per lane.
  static Int join(Int a, Int b, Int c, Int d) {
    constexpr int kOr = 0xFE;
    const Int low = _mm512_ternarylogic_epi32(a, _mm512_slli_epi32(b, 8), _mm512_slli_epi32(c, 16), kOr);
    return _mm512_or_si512(low, _mm512_slli_epi32(d, 24));
  }
  static void store_ints(std::uint8_t* p, Int a) { _mm512_storeu_si512(p, a); }
  // 4 x 4 bytes of every four lanes turned, for four lanes sixteen bytes of a line.
  static void store_turned(std::uint8_t* p, Int a) {
    a = _mm512_shuffle_epi8(a, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
    unroll<4>([&](auto i) KVF_INLINE_LAMBDA {
      constexpr int k = decltype(i)::value;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 64 * k), _mm512_extracti32x4_epi32(a, k));
    });
  }

  static KVF_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
  static KVF_INLINE void prefetch_early(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
  static KVF_INLINE void prefetch_codes(const std::uint8_t* p) {
    _mm_prefetch(reinterpret_cast<const char*>(p) + kPrefetchBytes, _MM_HINT_T0);
  }
  static Codes load_codes(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
  static Codes lookup(Codes index, Codes table) { return _mm512_permutexvar_epi8(index, table); }

  // 256 * high + low of four integers -> [high x4][low x4].
  static void expand(const std::int16_t* grid, std::uint8_t* operand) {
    for (int i = 0; i < 4; ++i) {
      operand[i] = static_cast<std::uint8_t>((grid[i] + 128) >> 8);
      operand[4 + i] = static_cast<std::uint8_t>(grid[i]);
    }
  }
  static void store_quads(Int grid, std::uint8_t* operand) { store_runs(grid, 1, operand); }
  // High bytes of `quads` quads, one, two or four, then their low bytes, and so on.
  static void store_runs(Int grid, int quads, std::uint8_t* operand) {
    const Int high = _mm512_add_epi32(grid, _mm512_set1_epi32(128));  // its second byte
    const Int both = _mm512_mask_blend_epi8(0x2222222222222222ull, grid, high);
    const __m512i packed = _mm512_permutexvar_epi8(_mm512_load_si512(kRuns[quads / 2]), both);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(operand), _mm512_castsi512_si256(packed));
  }
  alignas(64) static constexpr std::uint8_t kRuns[3][64] = {
      {1, 5, 9, 13, 0, 4, 8, 12, 17, 21, 25, 29, 16, 20, 24, 28, 33, 37, 41, 45, 32, 36, 40, 44, 49, 53, 57, 61, 48, 52, 56, 60},
      {1, 5, 9, 13, 17, 21, 25, 29, 0, 4, 8, 12, 16, 20, 24, 28, 33, 37, 41, 45, 49, 53, 57, 61, 32, 36, 40, 44, 48, 52, 56, 60},
      {1, 5, 9, 13, 17, 21, 25, 29, 33, 37, 41, 45, 49, 53, 57, 61, 0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60}};

  // With few rows two groups go side by side: a processor that starts two products a cycle and ends one in five keeps ten sums busy, and
  // the rows' numbers are fetched once for both.
  static constexpr int groups(int rows) { return rows <= 4 ? 2 : 1; }

  template <int Bits, int Quads, int Rows>
  static void dot(const Parts& parts, const std::uint8_t* operand, const std::int32_t* sum, const std::uint8_t* tables,
                  std::int32_t* out) {
    constexpr int kGroups = groups(Rows);
    // Indices known when compiling: compilers keep arrays that an assembly statement sees in memory otherwise.
    Int high[kGroups * Rows], low[kGroups * Rows];
    unroll<kGroups * Rows>([&](auto i) KVF_INLINE_LAMBDA {
      high[i] = _mm512_setzero_si512();
      low[i] = _mm512_set1_epi32(-kBias * sum[i % Rows]);
    });
    for (int part = 0; part < parts.count; ++part, operand += 8 * Quads) {
      const std::ptrdiff_t ahead = parts.ahead[part];
      const auto ask = [ahead](const std::uint8_t* line) KVF_INLINE_LAMBDA {
        prefetch_early(line + ahead);
        prefetch_codes(line);
      };
      walk_groups<Bits, Quads, kGroups>(parts.codes[part], ask, [&](int quad, const auto& codes, auto table) KVF_INLINE_LAMBDA {
        const Int levels = _mm512_load_si512(tables + 64 * table);
        const auto level = Lines<kGroups>::each([&](auto g) KVF_INLINE_LAMBDA {
          return Bits == kLevelBits ? codes.of[g] : lookup(codes.of[g], levels);
        });
        const std::uint8_t* x = operand + 8 * quad;
        unroll<Rows>([&](auto r) KVF_INLINE_LAMBDA {
          multiply<kGroups, Rows>(high + r, level, x + r * kOperandRow);
          multiply<kGroups, Rows>(low + r, level, x + r * kOperandRow + 4);
        });
      });
    }
    unroll<kGroups * Rows>([&](auto i) KVF_INLINE_LAMBDA {
      _mm512_store_si512(out + (i / Rows * kTileRows + i % Rows) * kLanes, _mm512_add_epi32(_mm512_slli_epi32(high[i], 8), low[i]));
    });
  }

  // sum += levels x signed bytes. Not the intrinsic: GCC gives its result another type, and copies every sum twice at each turn of a loop.
  static KVF_INLINE void add_products(Int& sum, Int level, Int x) { __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(level), "v"(x)); }

  // sums[g * Rows] += levels of group g x the four signed bytes at p. Of one group as one instruction, which compilers make two of: half as
  // many in flight reach further.
  template <int Groups, int Rows>
  static KVF_INLINE void multiply(Int* sums, const Lines<Groups>& level, const std::uint8_t* p) {
    struct Bytes { std::uint8_t x[4]; };
    if constexpr (Groups == 1) {
      __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums[0]) : "v"(level.of[0]), "m"(*reinterpret_cast<const Bytes*>(p)));
    } else {
      std::int32_t word;
      std::memcpy(&word, p, sizeof word);
      const Int x = _mm512_set1_epi32(word);
      unroll<Groups>([&](auto g) KVF_INLINE_LAMBDA { add_products(sums[g * Rows], level.of[g], x); });
    }
  }

 private:
  template <int High>
  static Float unpack_pairs(Float a, Float b) {
    const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return _mm512_castpd_ps(High == 0 ? _mm512_unpacklo_pd(x, y) : _mm512_unpackhi_pd(x, y));
  }
  static __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
};

}  // namespace
}  // namespace kvfold
#endif
