// Four lanes with NEON, the dot product extension (ARMv8.2) for integers and half-precision conversion.
//
// sdot multiplies signed bytes: levels need no bias; queries and weights are high and low bytes as everywhere.
#ifndef KVFOLD_SIMD_NEON_H
#define KVFOLD_SIMD_NEON_H

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "../half.h"
#include "level.h"
#include "planes.h"
#include "unroll.h"

namespace kvfold {
namespace {

struct SimdNeon : OneGroup {
  static constexpr int kWidth = 4;
  static constexpr int kBytes = 16;
  static constexpr int kBias = 0;
  static constexpr bool kMergesPairs = true;
  using Float = float32x4_t;
  using Int = int32x4_t;
  using Codes = uint8x16_t;

  static Float load(const float* p) { return vld1q_f32(p); }
  static Float load_half(const std::uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
  static Float load_bfloat16(const std::uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
  static Float load_int8(const std::int8_t* p) {
    std::int32_t word;
    std::memcpy(&word, p, sizeof word);
    const int16x8_t wide = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(word)));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
  }
  static Float load_int32(const std::int32_t* p) { return vcvtq_f32_s32(vld1q_s32(p)); }
  static void store(float* p, Float a) { vst1q_f32(p, a); }
  static Float set(float x) { return vdupq_n_f32(x); }
  static Float add(Float a, Float b) { return vaddq_f32(a, b); }
  static Float sub(Float a, Float b) { return vsubq_f32(a, b); }
  static Float mul(Float a, Float b) { return vmulq_f32(a, b); }
  static Float fma(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
  static Float max(Float a, Float b) { return vmaxq_f32(a, b); }
  // As in simd_avx2.h.
  static Float exp2(Float a) {
    a = vmaxq_f32(a, vdupq_n_f32(-126.0f));
    const Float whole = vrndnq_f32(a), fraction = vsubq_f32(a, whole);
    Float p = vdupq_n_f32(1.3333558e-3f);
    p = vfmaq_f32(vdupq_n_f32(9.6181291e-3f), p, fraction);
    p = vfmaq_f32(vdupq_n_f32(5.5504109e-2f), p, fraction);
    p = vfmaq_f32(vdupq_n_f32(2.4022651e-1f), p, fraction);
    p = vfmaq_f32(vdupq_n_f32(6.9314718e-1f), p, fraction);
    p = vfmaq_f32(vdupq_n_f32(1.0f), p, fraction);
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(p), vshlq_n_s32(vcvtq_s32_f32(whole), 23)));
  }
  static float reduce_max(Float a) { return vmaxvq_f32(a); }
  static float reduce_add(Float a) {  // the halving tree
    const float32x2_t pair = vadd_f32(vget_low_f32(a), vget_high_f32(a));
    return vget_lane_f32(pair, 0) + vget_lane_f32(pair, 1);
  }

  static Int round(Float a) { return vcvtnq_s32_f32(a); }
  static Int zero_int() { return vdupq_n_s32(0); }
  static Int add_int(Int a, Int b) { return vaddq_s32(a, b); }
  static Int load_ints(const std::uint8_t* p) { return vreinterpretq_s32_u8(vld1q_u8(p)); }
  static std::int32_t reduce_add_int(Int a) { return vaddvq_s32(a); }

  template <int Half>
  static Float butterfly(Float a) {
    const Float other = Half == 1 ? vrev64q_f32(a) : vextq_f32(a, a, 2);
    const uint32x4_t upper = Half == 1 ? uint32x4_t{0, ~0u, 0, ~0u} : uint32x4_t{0, 0, ~0u, ~0u};
    return vbslq_f32(upper, vsubq_f32(other, a), vaddq_f32(a, other));
  }
  // Rows of a matrix -> its columns.
  static KVF_INLINE void transpose(Float* m) {
    const float32x4x2_t a = vtrnq_f32(m[0], m[1]), b = vtrnq_f32(m[2], m[3]);
    m[0] = vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0]));
    m[1] = vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1]));
    m[2] = vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0]));
    m[3] = vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]));
  }

  // A codebook: how many thresholds lie strictly below a number, and the level of that code.
  template <int Bits>
  class Grid {
   public:
    explicit Grid(const kvf_side& of) : side(of), levels(vld1q_s8(of.levels)) {}
    KVF_INLINE Int nearest(Float a) const {
      uint32x4_t code = vdupq_n_u32(0);
      for (int t = 0; t < (1 << Bits) - 1; ++t)  // a true comparison is -1
        code = vsubq_u32(code, vcgtq_f32(a, vdupq_n_f32(side.thresholds[t])));
      return vreinterpretq_s32_u32(code);
    }
    KVF_INLINE Float level(Int code) const {
      const int8x16_t bytes = vqtbl1q_s8(levels, vreinterpretq_u8_s32(code));
      return vcvtq_f32_s32(vshrq_n_s32(vshlq_n_s32(vreinterpretq_s32_s8(bytes), 24), 24));
    }

   private:
    const kvf_side& side;
    const int8x16_t levels;
  };

  // Codes of four coordinates -> bytes of one word per lane.
  static Int join(Int a, Int b, Int c, Int d) { return vsliq_n_s32(vsliq_n_s32(vsliq_n_s32(a, b, 8), c, 16), d, 24); }
  static void store_ints(std::uint8_t* p, Int a) { vst1q_u8(p, vreinterpretq_u8_s32(a)); }
  // 4 x 4 bytes turned.
  static void store_turned(std::uint8_t* p, Int a) {
    constexpr std::uint8_t kTurn[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    vst1q_u8(p, vqtbl1q_u8(vreinterpretq_u8_s32(a), vld1q_u8(kTurn)));
  }

  static KVF_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
  static KVF_INLINE void prefetch_early(const void* p) { __builtin_prefetch(p, 0, 2); }
  static KVF_INLINE void prefetch_codes(const std::uint8_t* p) { __builtin_prefetch(p + kPrefetchBytes); }
  static Codes load_codes(const std::uint8_t* p) { return vld1q_u8(p); }
  template <int Shift>
  static Codes shift(Codes a) {
    if constexpr (Shift == 0) return a;
    else return vshrq_n_u8(a, Shift);
  }
  template <int LowShift, int HighBit>
  static Codes merge(Codes low, Codes high) {
    if constexpr (HighBit > 2) high = vshrq_n_u8(high, HighBit - 2);
    if constexpr (HighBit < 2) high = vshlq_n_u8(high, 2 - HighBit);
    return vorrq_u8(vandq_u8(shift<LowShift>(low), vdupq_n_u8(0x33)), vandq_u8(high, vdupq_n_u8(0x44)));
  }

  // 256 * high + low of four integers -> [high x4][low x4].
  static void expand(const std::int16_t* grid, std::uint8_t* operand) {
    const int16x4_t x = vld1_s16(grid), carried = vshr_n_s16(vadd_s16(x, vdup_n_s16(128)), 8);
    vst1_u8(operand, vreinterpret_u8_s8(vmovn_s16(vcombine_s16(carried, x))));
  }
  static void store_quads(Int grid, std::uint8_t* operand) {
    std::int16_t narrow[4];
    vst1_s16(narrow, vmovn_s32(grid));
    expand(narrow, operand);
  }

  template <int Bits, int Quads, int Rows>
  static void dot(const Parts& parts, const std::uint8_t* operand, const std::int32_t*, const std::uint8_t* table, std::int32_t* out) {
    constexpr int kRows = Rows < 4 ? Rows : 4;  // a pass: 16 accumulators for two quarters of the lines
    for (int first = 0; first < Rows; first += kRows)
      for (int quarter = 0; quarter < 4; ++quarter)
        quarter_line<Bits, Quads, kRows>(parts, quarter, operand + first * kOperandRow, table, out + first * kLanes + 4 * quarter);
  }

 private:
  template <int Bits, int Quads, int Rows>
  static void quarter_line(const Parts& parts, int quarter, const std::uint8_t* operand, const std::uint8_t* table, std::int32_t* out) {
    const int8x16_t levels = vreinterpretq_s8_u8(vld1q_u8(table));
    Int high[Rows], low[Rows];
    for (int r = 0; r < Rows; ++r) high[r] = low[r] = vdupq_n_s32(0);
    for (int part = 0; part < parts.count; ++part, operand += 8 * Quads)
      walk<SimdNeon, Bits, Quads>(parts.codes[part], quarter, [&](int quad, Codes codes) {
        const int8x16_t level =
            Bits == kLevelBits ? vreinterpretq_s8_u8(codes) : vqtbl1q_s8(levels, vandq_u8(codes, vdupq_n_u8(15)));
        for (int r = 0; r < Rows; ++r) {
          const int8x8_t bytes = vreinterpret_s8_u8(vld1_u8(operand + 8 * quad + r * kOperandRow));
          high[r] = vdotq_lane_s32(high[r], level, bytes, 0);
          low[r] = vdotq_lane_s32(low[r], level, bytes, 1);
        }
      });
    for (int r = 0; r < Rows; ++r) vst1q_s32(out + r * kLanes, vaddq_s32(vshlq_n_s32(high[r], 8), low[r]));
  }
};

}  // namespace
}  // namespace kvfold
#endif
