// Computed trellis codes: a level is 3 (2 X - M) + 2 (2 Y - M), M = 2^K - 1, X and Y fields of K bits whose bits are parities. No table: a word holds one
// step of many vectors, so that a few logical instructions make the fields of all of them, and tensor cores multiply them where they stand, masked.
//
// Keys: lane 4g + t holds coordinates (D/4) t + (D/16) b + s, byte b, step s; the rotated query lies in that order (quantize). 2 bits: word [s][rr] has
// tokens 16 j + 8 rr + g at bits 8 b + 2 j. 3 bits: word [s][2 P + rr] has tokens 16 (2 P + j) + 8 rr + g at bits 8 b + 4 j + 1. Values: coordinate (D/8) g + s; 2 bits: word
// [s] has tokens 8 (4 f + b) + t + 4 r at bits 8 b + 2 (2 f + r); 3 bits: word [s][f] has them at bits 8 b + 4 r + 1. Of 3 bits, three words of four are stored,
// [s][0..2] of keys, of values [2 i][0], [2 i][1], [2 i + 1][0]; their spare bits 0 are bits 1, 2, 3 of the fourth, which shifts to the left, products, put in place.
// A byte's run of keys goes on in the next byte, byte 3's in the next lane; a lane's runs of values in lane + 4. Before the first runs are start states.
// Behind the codes: [g][i] scale of token 8 i + g, six bits; bits 6 and 7 of a row, first byte lowest, are the float16 unit, in odd rows of keys with means the mean's
// scale. Then the words of the steps before the first runs: of keys, bytes 2 i + rr or 4 i + 2 P + rr of row g, step -1 - i; of values words i or 2 i + f of row t.
#pragma once
#include "trellis.cuh"
template <int K> constexpr int SYMBOLS = 1 + (REGISTER + K - 1) / K;                           // a field reads: the step's own and those before it
// The parities of codebook/trellis.toml, of whole words; symbol[i]: of the step i before.
template <int K> DI u32 field_x(const u32 (&symbol)[SYMBOLS<K>]) { return symbol[0] ^ symbol[1] ^ symbol[SYMBOLS<K> - 1]; }
template <int K> DI u32 field_y(const u32 (&symbol)[SYMBOLS<K>]) { return symbol[1] ^ (K == 2 ? symbol[2] << 1 & 0xaaaaaaaau : symbol[1] << 2 & 0x88888888u); }

// Spare bits, and the fourth of four words, out of those of the three that are stored.
constexpr u32 SPARE = 0x11111111u;
DI u32 fourth(u32 a, u32 b, u32 c) { return (a & SPARE) * 2 + (b & SPARE) * 4 + (c & SPARE) * 8; }

// One side's words of a half page. RUNS: words of a step; STEPS of a run; FIELDS of a byte; HELD words.
template <int K_, int D_, int V_> struct Words {
  static constexpr int K = K_, D = D_, V = V_, RUNS = (V ? 1 : 2) * (K == 2 ? 1 : 2), STEPS = V ? D / 8 : D / 16, FIELDS = K == 2 ? 4 : 2, HELD = D * K / 16, LINKS = SYMBOLS<K> - 1, FIRST = K == 3;   // bit of a byte's first field
  static constexpr u32 M = (1 << K) - 1, MASK = 0x01010101u * (M << FIRST);
  u32 w[HELD], link[RUNS][LINKS];
  DI void load(u32 base, int lane) {
#pragma unroll
    for (int i = 0; i < HELD / 4; i++) { const uint4 v = lds4(base + i * 512 + lane * 16); w[4 * i] = v.x; w[4 * i + 1] = v.y; w[4 * i + 2] = v.z; w[4 * i + 3] = v.w; }
  }
  // Of the field at bits 8 b + (8 / FIELDS) j + FIRST of a word of lane 4g + t: the token, inside the half page, and the coordinate at step s.
  static DI int token(int run, int b, int j, int g, int t) {
    return V ? 8 * (4 * (K == 2 ? j >> 1 : run) + b) + t + 4 * (j & 1) : 16 * ((run >> 1) * FIELDS + j) + 8 * (run & 1) + g;
  }
  static DI int coordinate(int s, int b, int g, int t) { return V ? D / 8 * g + s : D / 4 * t + D / 16 * b + s; }
  DI u32 stored(int run, int s) const {
    if constexpr (K == 2) return V ? w[s] : w[4 * (s >> 1) + run + 2 * (s & 1)];
    else {                                          // keys without spare bits: whole bytes of them are multiplied. By a subtraction that leaves the logical unit alone
      const int c = V ? 2 * (s & 1) + run : run; const u32* three = w + 3 * (V ? s >> 1 : s);
      return c == 3 ? fourth(three[0], three[1], three[2]) : V ? three[c] : mad(three[c] & SPARE, ~0u, three[c]);
    }
  }
  DI u32 step(int run, int s) const { return s < 0 ? link[run][-1 - s] : stored(run, s); }
  // What runs go on from; `rows`: the start words of this half page, in shared memory (by address) or global.
  DI void connect(u32 rows, int lane) {
    if constexpr (V) connect(lds4(rows + (lane & 3) * 16), lane);
    else { const uint2 v = lds2(rows + (lane >> 2) * 8); connect(make_uint4(v.x, v.y, 0, 0), lane); }
  }
  DI void connect(const unsigned char* rows, int lane) {
    if constexpr (V) connect(((const uint4*)rows)[lane & 3], lane);
    else { const uint2 v = ((const uint2*)rows)[lane >> 2]; connect(make_uint4(v.x, v.y, 0, 0), lane); }
  }
  DI void connect(uint4 row, int lane) {
    const bool first = V ? lane < 4 : (lane & 3) == 0; const u32 start[4] = {row.x, row.y, row.z, row.w};
#pragma unroll
    for (int i = 0; i < LINKS; i++)
#pragma unroll
      for (int run = 0; run < RUNS; run++) {
        const u32 own = stored(run, STEPS - 1 - i), left = __shfl_sync(~0u, own, lane - (V ? 4 : 1)); const int at = i * RUNS + run;
        if constexpr (V) link[run][i] = first ? start[at] : left;
        else link[run][i] = prmt(own, first ? start[at >> 2] : left, first ? 0x2104u + (at & 3) : 0x2107u);
      }
  }
  DI void fields(int run, int s, u32& x, u32& y) const {
    u32 symbol[SYMBOLS<K>];
#pragma unroll
    for (int i = 0; i < SYMBOLS<K>; i++) symbol[i] = step(run, s - i);
    x = field_x<K>(symbol); y = field_y<K>(symbol);
  }
  DI void fields_of_two(int i, u32 (&x)[RUNS][2], u32 (&y)[RUNS][2]) const {                  // steps 2 i and 2 i + 1 of all runs
#pragma unroll
    for (int run = 0; run < RUNS; run++)
#pragma unroll
      for (int h = 0; h < 2; h++) fields(run, 2 * i + h, x[run][h], y[run][h]);
  }
};
// Bits 6 and 7 of the eight bytes, the first byte's lowest.
DI u32 spares(uint2 codes) { return ((codes.x >> 6 & 0x03030303u) * 0x01041040u >> 24) | (codes.y >> 6 & 0x03030303u) * 0x01041040u >> 24 << 8; }
// Codes of the scales of tokens 8 i + g, as floats above 2^23, and a product with one of them.
constexpr float ABOVE = 8388608.f, MOST_SCALE = 63.f;
DI void scale_codes(float (&f)[8], uint2 codes) {
  const u32 low = codes.x & 0x3f3f3f3fu, high = codes.y & 0x3f3f3f3fu;
#pragma unroll
  for (int i = 0; i < 8; i++) f[i] = __uint_as_float(prmt(i < 4 ? low : high, __float_as_uint(ABOVE), 0x7440u + (i & 3)));
}
DI float times_code(float code, float x) { return fmaf(code, x, -ABOVE * x); }
// Units of a side's scales and of the mean, of keys with means, from row g.
template <bool MEAN> DI float unit_of_scales(float& mean, uint2 codes, int g) {
  const float mine = half_low(spares(codes)); float other = mine;
  if constexpr (MEAN) other = __shfl_xor_sync(~0u, mine, 4);
  mean = g & 1 ? mine : other;
  return g & 1 ? other : mine;
}
