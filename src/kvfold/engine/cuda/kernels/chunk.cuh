// 64 tokens of a page: scores, softmax weights, output. Integer tensor cores: K levels (u8) x query (16 bits as two signed bytes in two
// columns), V levels (u8, transposed) x weights (16 bits as two bytes in two columns). Lane 4g + t holds tokens 8i + g of column t.
#pragma once
#include "ring.cuh"

template <class C> struct State {                 // running softmax of one warp; column 4n + t in every lane 4g + t
  float O[C::NG][2 * C::MT], m[C::NG], l[C::NG], zs[C::NG];           // O: dim (D/8) g + i, rotated; zs: sum of weights, for the zero point
  float cs[C::NG]; int zq[C::NG];                                     // score units to log2 units; sum of the integer query
  DI void reset() {
#pragma unroll
    for (int n = 0; n < C::NG; n++) {
      m[n] = -1e30f; l[n] = zs[n] = 0;
#pragma unroll
      for (int i = 0; i < 2 * C::MT; i++) O[n][i] = 0;
    }
  }
  DI void raise(int n, float mc) {                // the running maximum moves for some column: rescale
    if (__any_sync(~0u, mc > m[n])) {
      float mn = fmaxf(m[n], mc), r = ex2(m[n] - mn); m[n] = mn; l[n] *= r; zs[n] *= r;
#pragma unroll
      for (int i = 0; i < 2 * C::MT; i++) O[n][i] *= r;
    }
  }
};
constexpr float MASKED = -3e38f;

template <int NW> DI void load_words(u32 (&w)[NW], u32 base) {
#pragma unroll
  for (int i = 0; i < NW / 4; i++) { uint4 v = lds4(base + i * 512); w[4 * i] = v.x; w[4 * i + 1] = v.y; w[4 * i + 2] = v.z; w[4 * i + 3] = v.w; }
}
DI void half8(float (&f)[8], uint4 v) {
  f[0] = half_low(v.x); f[1] = half_high(v.x); f[2] = half_low(v.y); f[3] = half_high(v.y);
  f[4] = half_low(v.z); f[5] = half_high(v.z); f[6] = half_low(v.w); f[7] = half_high(v.w);
}
// <q, mean> of the half page in the chunk's score units; every row of the A tile is the mean, so every lane gets its column's sum.
template <class C> DI void mean_offset(float (&off)[C::NG], float scale, u32 base, u32 q_raw, const float* column, int lane) {
  const int t = lane & 3; u32 w[C::MT];
#pragma unroll
  for (int i = 0; i < C::MT / 4; i++) { uint4 v = lds4(base + t * (C::D / 4) + i * 16); w[4 * i] = v.x; w[4 * i + 1] = v.y; w[4 * i + 2] = v.z; w[4 * i + 3] = v.w; }
#pragma unroll
  for (int n = 0; n < C::NG; n++) {
    int c[4] = {0, 0, 0, 0}; u32 q[C::MT]; load_words<C::MT>(q, q_raw + n * C::D * 8 + lane * 16);
#pragma unroll
    for (int k = 0; k < C::KT; k++) { u32 a[4] = {w[2 * k], w[2 * k], w[2 * k + 1], w[2 * k + 1]}; mma_ss(c, a, q[2 * k], q[2 * k + 1]); }
    off[n] = (float)(c[0] * 256 + c[1]) * (scale * column[(4 * n + t) * 4 + 2]);
  }
}
// Integer scores of 64 tokens: acc[n][token tile of 16].
template <class C> DI void key_products(int (&acc)[C::NG][4][4], u32 base, u32 q_rot, const State<C>& s, const Levels& lut, int lane) {
  constexpr int B = bits_of(C::KF), PASSES = C::D / 128 > 1 ? C::D / 128 : 1, NW = C::D * B / 16 / PASSES;
#pragma unroll
  for (int n = 0; n < C::NG; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) { int z = C::KF == 1 ? -((3 * s.zq[n] << (2 * i)) >> 1) : -ZERO * s.zq[n]; acc[n][i][0] = acc[n][i][2] = 0; acc[n][i][1] = acc[n][i][3] = z; }
#pragma unroll
  for (int p = 0; p < PASSES; p++) {
    u32 w[NW]; load_words<NW>(w, base + p * NW * 128 + lane * 16);
    if constexpr (C::KF == 1) {                   // words by step of 32 dims, fields by token tile
#pragma unroll
      for (int n = 0; n < C::NG; n++) {
        u32 q[C::MT / PASSES]; load_words<C::MT / PASSES>(q, q_rot + n * C::D * 8 + p * 1024 + lane * 16);
#pragma unroll
        for (int k = 0; k < C::KT / PASSES; k++)
#pragma unroll
          for (int j = 0; j < 4; j++) {
            u32 a[4];
#pragma unroll
            for (int r = 0; r < 4; r++) a[r] = w[4 * k + r] & (0x03030303u << (2 * j));
            mma_us(acc[n][j], a, q[2 * k], q[2 * k + 1]);
          }
      }
    } else {
      u32 q[C::NG][C::MT];
#pragma unroll
      for (int n = 0; n < C::NG; n++) load_words<C::MT>(q[n], q_rot + n * C::D * 8 + lane * 16);
#pragma unroll
      for (int i = 0; i < 4 / PASSES; i++)
#pragma unroll
        for (int h = 0; h < C::D / 64; h++) {
          u32 o[8]; decode<C::KF>(w + (i * (C::D / 64) + h) * B, o, lut);
#pragma unroll
          for (int n = 0; n < C::NG; n++) {
            mma_us(acc[n][p * (4 / PASSES) + i], o, q[n][4 * h], q[n][4 * h + 1]);
            mma_us(acc[n][p * (4 / PASSES) + i], o + 4, q[n][4 * h + 2], q[n][4 * h + 3]);
          }
        }
    }
  }
}
template <class C> DI void trellis_key_products(int (&acc)[C::NG][4][4], u32 base, u32 q_rot, uint4 scales, const State<C>& s, const Levels& book, u32 table, int lane) {
  using R = Runs<C::KF, 8, C::D / 4>; u32 w[R::WORDS]; load_stream<R>(w, base, lane);
  const bool first = (lane & 3) == 0; const Lookup pairs = lookup<C::KF>(table, lane);
#pragma unroll
  for (int n = 0; n < C::NG; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) { acc[n][i][0] = acc[n][i][2] = 0; acc[n][i][1] = acc[n][i][3] = -ZERO * s.zq[n]; }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    u32 run[2][R::HELD];
#pragma unroll
    for (int r = 0; r < 2; r++) open_run<R>(run[r], w, 2 * i + r, lane - 1, first, start_of(book, entry(scales, 2 * i + r)));
#pragma unroll
    for (int k = 0; k < C::KT; k++) {
      u32 a[4];
#pragma unroll
      for (int m = 0; m < 4; m++) { const int at = 4 * k + 2 * (m >> 1); a[m] = level_pair<R>(run[m & 1], at, pairs) | level_pair<R>(run[m & 1], at + 1, pairs) << 16; }
#pragma unroll
      for (int n = 0; n < C::NG; n++) {
        const uint2 q = lds2(q_rot + n * C::D * 8 + (k >> 1) * 512 + lane * 16 + (k & 1) * 8);
        mma_us(acc[n][i], a, q.x, q.y);
      }
    }
  }
}
// The same of a computed code. Sums are exact modulo 2^32, what is left after the zero point fits.
template <class C> DI void computed_key_products(int (&acc)[C::NG][4][4], u32 base, u32 q_rot, const State<C>& s, int lane) {
  using R = Words<pair_bits(C::KF) / 2, C::D, 0>; R words; words.load(base, lane); words.connect(base + C::Reg::K_CODES + 64, lane);
#pragma unroll
  for (int n = 0; n < C::NG; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) {                 // a tile holds the sums of fields 0..j
      acc[n][i][0] = acc[n][i][2] = 0;
      acc[n][i][1] = acc[n][i][3] = R::K == 2 ? (s.zq[n] >> 1) - s.zq[n] * (2 << 2 * i) : i & 1 ? -119 * s.zq[n] : -7 * s.zq[n];
    }
#pragma unroll
  for (int u = 0; u < C::KT; u++) {
    u32 x[R::RUNS][2], y[R::RUNS][2];
    words.fields_of_two(u, x, y);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int p = i / R::FIELDS, j = i % R::FIELDS; const u32 mask = j == R::FIELDS - 1 ? ~0u : R::K == 2 ? 0x01010101u * ((4u << 2 * j) - 1) : R::MASK;
      const u32 a[4] = {x[2 * p][0] & mask, x[2 * p + 1][0] & mask, x[2 * p][1] & mask, x[2 * p + 1][1] & mask};
      const u32 b[4] = {y[2 * p][0] & mask, y[2 * p + 1][0] & mask, y[2 * p][1] & mask, y[2 * p + 1][1] & mask};
#pragma unroll
      for (int n = 0; n < C::NG; n++) {
        const u32 at = q_rot + n * C::D * 8 + (u >> 1) * 512 + lane * 16 + (u & 1) * 8; const uint2 q = lds2(at), r = lds2(at + C::Q_BYTES * (1 + C::MEAN));
        mma_us(acc[n][i], a, q.x, q.y); mma_us(acc[n][i], b, r.x, r.y);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < C::NG; n++)
#pragma unroll
    for (int i = 3; i > 0; i--)
      if (i % R::FIELDS)
#pragma unroll
        for (int c = 0; c < 4; c++) acc[n][i][c] -= acc[n][i - 1][c];
}
// p * part as 16-bit integers, of `fac` each, split into bytes and moved from C to B layout: two shuffles per 32 tokens.
template <class C> DI void whole_weights(u32 (&pb)[2][2], float fac, float& zs, const float (&x)[8], const float (&part)[8], int lane) {
  const int g = lane >> 2, t = lane & 3; u32 f[8], sum = 0u - 8u * 0x4B000000u;
  const u32 selX = lane < 16 ? 0x7531u : 0x6420u, selY = selX ^ (0x7531u ^ 0x6420u);
  const int srcX = (t + 4 * (g & 1)) * 4 + (g >> 1), srcY = srcX ^ 16;
#pragma unroll
  for (int i = 0; i < 8; i++) { f[i] = __float_as_uint(fmaf(x[i], part[i], 8388608.f)); sum += f[i]; }      // 2^23: low 16 bits are the integer
  zs = fmaf((float)(int)sum, fac, zs);
#pragma unroll
  for (int k = 0; k < 2; k++) {
    u32 pa = prmt(f[4 * k], f[4 * k + 1], 0x5410u), pc = prmt(f[4 * k + 2], f[4 * k + 3], 0x5410u);
    u32 X = __shfl_sync(~0u, prmt(pa, pc, selX), srcX), Y = __shfl_sync(~0u, prmt(pa, pc, selY), srcY);
    pb[k][0] = g & 1 ? Y : X; pb[k][1] = g & 1 ? X : Y;
  }
}
// The same with part = V scale, relative to the chunk's largest, vm.
template <class C> DI void weights(u32 (&pb)[2][2], float& fac, float& zs, const float (&x)[8], const float (&vs)[8], float vm, int lane) {
  const float kv = 65535.f * rcp(vm); float part[8]; fac *= vm * (1.f / 65535.f);
#pragma unroll
  for (int i = 0; i < 8; i++) part[i] = vs[i] * kv;
  whole_weights<C>(pb, fac, zs, x, part, lane);
}
template <class C> DI void add_tile(float* O, const int (&c)[4], float f) {
  O[0] = fmaf((float)(c[0] * 256 + c[1]), f, O[0]); O[1] = fmaf((float)(c[2] * 256 + c[3]), f, O[1]);
}
template <class C, int NW> DI void value_products(State<C>& s, const u32 (&w)[NW], const u32 (&pb)[C::NG][2][2], const float (&fac)[C::NG], const Levels& lut, int pass) {
  constexpr int TILES = NW / bits_of(C::VF);      // dim tiles of 16 in these words
  if constexpr (C::VF == 1) {
#pragma unroll
    for (int q = 0; q < TILES / 4; q++)
#pragma unroll
      for (int n = 0; n < C::NG; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
          int c[4] = {0, 0, 0, 0};
#pragma unroll
          for (int k = 0; k < 2; k++) {
            u32 a[4];
#pragma unroll
            for (int r = 0; r < 4; r++) a[r] = w[(q * 2 + k) * 4 + r] & (0x03030303u << (2 * j));
            mma_uu(c, a, pb[n][k][0], pb[n][k][1]);
          }
          add_tile<C>(&s.O[n][2 * (pass * TILES + q * 4 + j)], c, fac[n] * (1.f / (1 << (2 * j))));
        }
  } else {
#pragma unroll
    for (int i = 0; i < TILES; i++) {
      u32 o[8]; decode<C::VF>(w + i * bits_of(C::VF), o, lut);
#pragma unroll
      for (int n = 0; n < C::NG; n++) {
        int c[4] = {0, 0, 0, 0};
        mma_uu(c, o, pb[n][0][0], pb[n][0][1]); mma_uu(c, o + 4, pb[n][1][0], pb[n][1][1]);
        add_tile<C>(&s.O[n][2 * (pass * TILES + i)], c, fac[n]);
      }
    }
  }
}
template <class C> DI void trellis_value_products(State<C>& s, Ring<C>& ring, u32 base, const u32 (&pb)[C::NG][2][2], const float (&fac)[C::NG], const Levels& book, u32 table, int lane) {
  using R = Runs<C::VF, 16, C::D / 8>; const bool first = lane < 4; const Lookup pairs = lookup<C::VF>(table, lane);
  u32 run[R::TOKENS][R::HELD];
  {
    u32 w[R::WORDS]; load_stream<R>(w, base, lane);
    const uint4 header[2] = {lds4(base + C::Reg::V_CODES + (lane & 3) * 16), lds4(base + C::Reg::V_CODES + (lane & 3) * 16 + 64)};
    ring.release();
#pragma unroll
    for (int u = 0; u < R::TOKENS; u++) open_run<R>(run[u], w, u, lane - 4, first, start_of(book, entry(header[u >> 2 & 1], 4 * (u >> 3) + (u & 3))));
  }
#pragma unroll
  for (int i = 0; i < C::MT; i++) {
    u32 o[8];
#pragma unroll
    for (int h = 0; h < 4; h++) {
      u32 two[2]; part_pairs(two, level_pair<R>(run[4 * h], i, pairs), level_pair<R>(run[4 * h + 1], i, pairs), level_pair<R>(run[4 * h + 2], i, pairs), level_pair<R>(run[4 * h + 3], i, pairs));
      o[2 * h] = two[0]; o[2 * h + 1] = two[1];
    }
#pragma unroll
    for (int n = 0; n < C::NG; n++) {
      int c[4] = {0, 0, 0, 0};
      mma_uu(c, o, pb[n][0][0], pb[n][0][1]); mma_uu(c, o + 4, pb[n][1][0], pb[n][1][1]);
      add_tile<C>(&s.O[n][2 * i], c, fac[n]);
    }
  }
}
// The same of a computed code. Weights of tokens whose fields stand higher in four, or eight, bits are that much smaller; products are `high` times too large.
template <class C> DI void computed_value_products(State<C>& s, Ring<C>& ring, u32 base, const u32 (&px)[C::NG][2][2], const u32 (&py)[C::NG][2][2], const float (&fac)[C::NG], int lane) {
  using R = Words<pair_bits(C::VF) / 2, C::D, 1>; R words; words.load(base, lane); words.connect(base + C::Reg::V_CODES + 64, lane); ring.release();
  constexpr float high = R::K == 2 ? 16.f : 2.f;
#pragma unroll
  for (int i = 0; i < C::MT; i++) {
    int c[C::NG][4] = {}; u32 x[R::RUNS][2], y[R::RUNS][2];
    words.fields_of_two(i, x, y);
#pragma unroll
    for (int f = 0; f < 2; f++) {
      const int run = R::RUNS == 2 ? f : 0; const u32 lower = R::K == 2 ? R::MASK << 4 * f : R::MASK, upper = lower << (R::K == 2 ? 2 : 4);
      const u32 a[4] = {x[run][0] & lower, x[run][1] & lower, x[run][0] & upper, x[run][1] & upper}, b[4] = {y[run][0] & lower, y[run][1] & lower, y[run][0] & upper, y[run][1] & upper};
#pragma unroll
      for (int n = 0; n < C::NG; n++) {
        if (R::K == 2 && f == 1)
#pragma unroll
          for (int k = 0; k < 4; k++) c[n][k] *= 16;
        mma_uu(c[n], a, px[n][f][0], px[n][f][1]); mma_uu(c[n], b, py[n][f][0], py[n][f][1]);
      }
    }
#pragma unroll
    for (int n = 0; n < C::NG; n++) add_tile<C>(&s.O[n][2 * i], c[n], fac[n] * (1.f / high));
  }
}
// Scores of the next chunk, in units of s.cs; its slot is released.
template <class C> DI void chunk_scores(float (&x)[C::NG][8], const State<C>& s, Ring<C>& ring, const Levels& book, u32 q_rot, const float* column, u32 tables, int lane) {
  const int g = lane >> 2; float f8[8], off[C::NG];
#pragma unroll
  for (int n = 0; n < C::NG; n++) off[n] = 0;
  const u32 base = ring.wait(), codes = base + C::Reg::MEAN_BYTES; int acc[C::NG][4][4];
  if constexpr (is_computed(C::KF)) {
    computed_key_products<C>(acc, codes, q_rot, s, lane);
    const uint2 held = lds2(codes + C::Reg::K_CODES + g * 8); float mean; const float unit = unit_of_scales<C::MEAN>(mean, held, g);
    scale_codes(f8, held);
#pragma unroll
    for (int i = 0; i < 8; i++) f8[i] = times_code(f8[i], unit * (1.f / (1 << (C::KF == COMPUTED_2 ? i & 6 : 2 * (i & 2) + 1))));    // fields of tile i / 2 stand so many bits higher
    if constexpr (C::MEAN) mean_offset<C>(off, mean, base, q_rot + C::Q_BYTES, column, lane);
  } else if constexpr (is_trellis(C::KF)) {
    const uint4 sc = lds4(codes + C::Reg::K_CODES + g * 16);
    trellis_key_products<C>(acc, codes, q_rot, sc, s, book, tables, lane);
    if constexpr (C::MEAN) mean_offset<C>(off, held_half(sc.y), base, q_rot + C::Q_BYTES, column, lane);
    trellis_scales(f8, sc);
  } else {
    key_products<C>(acc, codes, q_rot, s, book, lane);
    uint4 sc = lds4(codes + C::Reg::K_CODES + g * 16);
    if constexpr (C::MEAN) {
      const u32 signs = __ballot_sync(~0u, (lane & 2 ? sc.y : sc.x) << (lane & 1 ? 0 : 16) >> 31);
      sc.x &= 0x7fff7fffu; sc.y &= 0x7fff7fffu;
      mean_offset<C>(off, half_low(signs), base, q_rot + C::Q_BYTES, column, lane);
    }
    half8(f8, sc);
  }
  ring.release();
#pragma unroll
  for (int n = 0; n < C::NG; n++)
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int up = C::KF == 1 ? i & 6 : 0;      // bits that a field of tile i / 2 stands higher
      float k = f8[i] * (1.f / (1 << up));
      x[n][i] = fmaf((float)(acc[n][i >> 1][(i & 1) * 2] * 256 + acc[n][i >> 1][(i & 1) * 2 + 1]), k, off[n]);
    }
}
// One chunk: its first `hidden` tokens (sinks) and those from `shown` on (a trimmed page) are masked.
template <class C> DI void chunk(State<C>& s, Ring<C>& ring, const Plan& plan, u32 q_rot, const float* column, int hidden, int shown, u32 tables, int lane) {
  const int g = lane >> 2; float x[C::NG][8], fac[C::NG], f8[8];
  chunk_scores<C>(x, s, ring, plan.P.key, q_rot, column, tables, lane);
  if (hidden > 0 || shown < 64) {
#pragma unroll
    for (int n = 0; n < C::NG; n++)
#pragma unroll
      for (int i = 0; i < 8; i++) if (8 * i + g < hidden || 8 * i + g >= shown) x[n][i] = MASKED;
  }
#pragma unroll
  for (int n = 0; n < C::NG; n++) {
    float mx = x[n][0], lc = 0;
#pragma unroll
    for (int i = 1; i < 8; i++) mx = fmaxf(mx, x[n][i]);
#pragma unroll
    for (int d = 4; d < 32; d *= 2) mx = fmaxf(mx, __shfl_xor_sync(~0u, mx, d));
    const float mc = fmaxf(mx * s.cs[n], -1e30f);                       // all masked: weights 0, not exp(0)
    s.raise(n, mc);
#pragma unroll
    for (int i = 0; i < 8; i++) { x[n][i] = ex2(fmaf(x[n][i], s.cs[n], -mc)); lc += x[n][i]; }
    fac[n] = ex2(mc - s.m[n]); s.l[n] = fmaf(lc, fac[n], s.l[n]);
  }
  const u32 base = ring.wait();
  if constexpr (is_computed(C::VF)) {
    u32 px[C::NG][2][2], py[C::NG][2][2]; float mean, code[8], part_x[8], part_y[8]; const float up = C::VF == COMPUTED_2 ? 4.f : 16.f;
    const uint2 held = lds2(base + C::Reg::V_CODES + g * 8); const float unit = unit_of_scales<false>(mean, held, g);
    const float step = 65535.f / MOST_SCALE * (g & 4 ? 1.f / up : 1.f);
    scale_codes(code, held);
#pragma unroll
    for (int i = 0; i < 8; i++) { part_x[i] = times_code(code[i], step); part_y[i] = times_code(code[i], step * (2.f / 3.f)); }
#pragma unroll
    for (int n = 0; n < C::NG; n++) {
      float sum = 0; fac[n] *= unit * (MOST_SCALE / 65535.f);
      whole_weights<C>(px[n], fac[n], sum, x[n], part_x, lane); whole_weights<C>(py[n], fac[n], sum, x[n], part_y, lane);
      s.zs[n] = fmaf(sum, g & 4 ? up : 1.f, s.zs[n]);
    }
    computed_value_products<C>(s, ring, base, px, py, fac, lane);
    return;
  }
  const uint4 sc = lds4(base + C::Reg::V_CODES + g * 16);
  if constexpr (is_trellis(C::VF)) {
    u32 pb[C::NG][2][2]; trellis_scales(f8, sc); float vm = 1e-7f;
#pragma unroll
    for (int i = 0; i < 8; i++) vm = fmaxf(vm, f8[i]);
#pragma unroll
    for (int d = 4; d < 32; d *= 2) vm = fmaxf(vm, __shfl_xor_sync(~0u, vm, d));
#pragma unroll
    for (int n = 0; n < C::NG; n++) weights<C>(pb[n], fac[n], s.zs[n], x[n], f8, vm, lane);
    trellis_value_products<C>(s, ring, base, pb, fac, plan.P.value, tables + C::K_TABLE, lane);
  } else {
  constexpr int PASSES = C::D / 128 > 1 ? C::D / 128 : 1, NW = C::D * bits_of(C::VF) / 16 / PASSES;
  u32 w[NW]; load_words<NW>(w, base + lane * 16);
  if constexpr (PASSES == 1) ring.release();
  u32 hm = half_max2(half_max2(sc.x, sc.y), half_max2(sc.z, sc.w)), pb[C::NG][2][2];
#pragma unroll
  for (int d = 4; d < 32; d *= 2) hm = half_max2(hm, __shfl_xor_sync(~0u, hm, d));
  float vm = fmaxf(fmaxf(half_low(hm), half_high(hm)), 1e-7f);
  half8(f8, sc);
#pragma unroll
  for (int n = 0; n < C::NG; n++) weights<C>(pb[n], fac[n], s.zs[n], x[n], f8, vm, lane);
  value_products<C, NW>(s, w, pb, fac, plan.P.value, 0);
  if constexpr (PASSES == 2) {
    load_words<NW>(w, base + NW * 128 + lane * 16); ring.release();
    value_products<C, NW>(s, w, pb, fac, plan.P.value, 1);
  }
  }
}
