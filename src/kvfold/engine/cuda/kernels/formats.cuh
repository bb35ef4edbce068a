// Codes to 7-bit levels by byte permutes. Formats: 4, 3, 2 = any odd-symmetric levels; 1 = two-bit uniform, whose fields are used in place.
// A lane's codes lie in mma fragment order, 32 codes in `bits` words:
//   4 bits: 4 words of 8 nibbles.  3 bits: 3 words of 8 nibbles whose spare bits 3 are the fourth word.
//   2 bits: 2 words; nibble n of word i holds code 16 i + n in bits 0-1 and code 16 i + 8 + n in bits 2-3.
//   uniform: field j (bits 2j, 2j+1) of each byte is one of four tiles; masked in place it is level code * 4^j.
// Trellis codes, formats 10 + twice their bits, are streams instead of fields: trellis.cuh. Computed ones, 20 + twice their bits: computed.cuh.
#pragma once
#include "ptx.cuh"
struct Levels { u32 a, b, c, d; };       // entries 0-3, 4-7, 8-11, 12-15: level + ZERO
constexpr int ZERO = 64;
__host__ __device__ constexpr int bits_of(int format) { return format == 1 ? 2 : format; }
__host__ __device__ constexpr bool is_computed(int format) { return format > 20; }
constexpr int COMPUTED_2 = 24, COMPUTED_3 = 26;
__host__ __device__ constexpr bool is_trellis(int format) { return format > 10 && !is_computed(format); }
__host__ __device__ constexpr int pair_bits(int format) { return is_computed(format) ? format - 20 : is_trellis(format) ? format - 10 : 2 * bits_of(format); }  // of two codes

// What products count in: levels are `unit` times (what is multiplied - zero). Of computed codes that is X + 2/3 Y; of their values, with the
// zero point of either field on its own sum of weights.
__host__ __device__ constexpr float unit_of(int format) { return format == 1 ? 2.f : is_computed(format) ? 6.f : 1.f; }
__host__ __device__ constexpr float zero_of(int format) { return format == 1 ? 1.5f : is_computed(format) ? .5f * ((1 << pair_bits(format) / 2) - 1) : (float)ZERO; }

// 32 codes (bits words) -> 32 level bytes, i.e. two A fragments.
template <int F> DI void decode(const u32* w, u32* o, const Levels& t) {
  if constexpr (F == 4) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      // Bit 3 of a nibble makes PRMT replicate the byte's sign bit, which is 0: each half table silences the other.
      u32 x = w[i], y = x ^ 0x88888888u;
      o[2 * i] = prmt(t.a, t.b, x) | prmt(t.c, t.d, y);
      o[2 * i + 1] = prmt(t.a, t.b, x >> 16) | prmt(t.c, t.d, y >> 16);
    }
  } else if constexpr (F == 3) {
    u32 s[4] = {w[0] & 0x77777777u, w[1] & 0x77777777u, w[2] & 0x77777777u,
                ((w[0] >> 3) & 0x11111111u) | ((w[1] >> 2) & 0x22222222u) | ((w[2] >> 1) & 0x44444444u)};
#pragma unroll
    for (int i = 0; i < 4; i++) { o[2 * i] = prmt(t.a, t.b, s[i]); o[2 * i + 1] = prmt(t.a, t.b, s[i] >> 16); }
  } else {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      u32 e = w[i] & 0x33333333u, f = (w[i] >> 2) & 0x33333333u;
      o[4 * i] = prmt(t.a, t.b, e); o[4 * i + 1] = prmt(t.a, t.b, e >> 16);
      o[4 * i + 2] = prmt(t.a, t.b, f); o[4 * i + 3] = prmt(t.a, t.b, f >> 16);
    }
  }
}

// One KV head of a page: two halves of 64 tokens, each [mean D int8 | pad to 128][K codes | 64 fp16][V codes | 64 fp16]. Codes in 16-byte pieces
// [piece][lane]; scales of token 8 i + g at [g][i]; mean of dim 32 k + 16 r + 4 t + b at byte (D/4) t + 8 k + 4 r + b. Scales are not negative:
// the signs of K scales [g][t], g < 4, t < 4, hold bit 4 g + t of the mean's fp16 scale. So every copy is whole 128-byte lines: unaligned bulk
// copies run at two thirds of the speed. Of a trellis code a scale is [header | byte]: bytes of tokens g and 8 + g hold the page's unit,
// those of 16 + g and 24 + g the mean's scale. Of a computed code: computed.cuh.
template <int D_, int KF_, int VF_, int MEAN_> struct Region {
  static constexpr int D = D_, KF = KF_, VF = VF_, MEAN = MEAN_;
  static constexpr int K_CODES = 4 * D * pair_bits(KF), V_CODES = 4 * D * pair_bits(VF);
  static constexpr int MEAN_BYTES = MEAN ? (D + 127) / 128 * 128 : 0;
  static constexpr int K_HALF = MEAN_BYTES + K_CODES + 128, V_HALF = V_CODES + 128;       // what one copy moves
  static constexpr int HALF = K_HALF + V_HALF, BYTES = 2 * HALF;
};
