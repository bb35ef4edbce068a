// 128 tokens of one KV head -> one side of a page of trellis codes in the kernels' order: centre, rotate, search, scale, pack. Codes and bytes equal the
// canonical encoder's (codec/trellis.py). 128 threads; blocks walk over pages * heads; 16-bit input. Layout: trellis.cuh. Addresses: as fold.cu's.
// Search: one thread per vector, the costs of 64 states in registers. A cost holds, below its 4th bit, which predecessor it is of the states it leads to, so
// that one addition and minimum per branch also finds the origin; costs stay below 2^20. Errors' squares are made once per level in floating point,
// where they are exact, on a pipe that the branches leave idle. Origins: half a byte per step and state in global memory.
// Bound: the integer pipe, 64 2^k additions with minimum and about 200 operations a step.
#include "fold.cuh"
// Sum of D products held 8 threads x N: dim 8 j + k. Halving tree: registers first, then lanes.
template <int N> DI float tree(float (&v)[N]) {
#pragma unroll
  for (int s = 2; s <= N; s *= 2)
#pragma unroll
    for (int j = 0; j < N / s; j++) v[j] = add(v[j], v[j + N / s]);
#pragma unroll
  for (int d = 4; d > 0; d /= 2) v[0] = add(v[0], __shfl_xor_sync(~0u, v[0], d));
  return v[0];
}
// H y of D numbers held the same way, not normalised.
template <int N> DI void butterflies(float (&y)[N], int k) {
#pragma unroll
  for (int d = 1; d < 8; d *= 2)
#pragma unroll
    for (int j = 0; j < N; j++) { float o = __shfl_xor_sync(~0u, y[j], d); y[j] = k & d ? sub(o, y[j]) : add(y[j], o); }
#pragma unroll
  for (int h = 1; h < N; h *= 2)
#pragma unroll
    for (int j = 0; j < N; j++) if (!(j & h)) { float a = y[j], b = y[j + h]; y[j] = add(a, b); y[j + h] = sub(a, b); }
}
#include "computed.cuh"
struct TrellisFoldArgs {
  const void* x; const u64* page; const float* sign; int* nonfinite; u32* origins; const signed char* window_levels;   // levels of even windows, of odd ones
  long long x_p, x_h, x_t; int pages, heads, sinks, rule; float inv_sqrt_d, step, gain, clip, inv_shift; u8 start[4]; float level[64];
};
#ifndef VARIANT    // D, key format, value format, mean, float16, value?, index bits, masks of even steps (6), of odd steps (6)
#define VARIANT 128, 17, 15, 1, 0, 0, 6, 484, 282, 417, 48, 8, 440, 200, 148, 498, 801, 208, 736
#endif
constexpr int GIVEN[] = {VARIANT};
constexpr int THREADS = 128, STATES = 64, RENORMALISE = 16, AHEAD = 8;           // AHEAD: steps whose origins are asked for at once
constexpr u32 TOP = 65535u << 4;                                                 // a cost that is saturated
constexpr float FULL = 50, MOST = 63, ERROR_TOP = 255;                           // codec/trellis.py
struct Cfg : Region<GIVEN[0], GIVEN[1], GIVEN[2], GIVEN[3]> {
  static constexpr int H16 = GIVEN[4], V = GIVEN[5], INDEX = GIVEN[6], LEVELS = 1 << INDEX, F = V ? VF : KF, EVEN = pair_bits(F) / 2, ODD = pair_bits(F) - EVEN;
  static constexpr int ROW = D + 8, N = D / 8, ORIGIN = 4, WORDS = STATES * ORIGIN / 32, WINDOWS = (STATES << EVEN) + (STATES << ODD);
  static constexpr int SMEM = TOKENS * ROW * 2 + WINDOWS + 4 * D * 4 + TOKENS * 4 + TOKENS;
};
using C = Cfg;
// Of the table of levels, by window: parities of its masked bits.
template <int PHASE> struct Index {
  u8 of[STATES << (PHASE ? C::ODD : C::EVEN)];
  constexpr Index() : of{} {
    for (int w = 0; w < STATES << (PHASE ? C::ODD : C::EVEN); w++)
      for (int i = 0; i < C::INDEX; i++) { int odd = w & GIVEN[7 + 6 * PHASE + i]; odd ^= odd >> 8; odd ^= odd >> 4; odd ^= odd >> 2; odd ^= odd >> 1; of[w] = (u8)(of[w] << 1 | (odd & 1)); }
  }
};
template <int PHASE> constexpr Index<PHASE> INDEX_OF{};
// One step of all 64 states: costs after it, marked for the step that follows; origins in w.
template <int PHASE> DI void advance(u32 (&cost)[STATES], float x, const TrellisFoldArgs& P, u32 (&w)[C::WORDS]) {
  constexpr int K = PHASE ? C::ODD : C::EVEN, NEXT = PHASE ? C::EVEN : C::ODD, KEYS = 1 << K; u32 metric[C::LEVELS], after[STATES];
#pragma unroll
  for (int l = 0; l < C::LEVELS; l++) {                              // 16 floor(error^2 / 2^shift): a float above 2^23 holds the floor in its lowest bits
    const float e = fminf(fabsf(x - P.level[l]), ERROR_TOP);
    metric[l] = (__float_as_uint(__fmaf_rz(e, e * P.inv_shift, 8388608.f)) - 0x4b000000u) * 16u;
  }
#pragma unroll
  for (int s = 0; s < STATES; s++) {
    u32 best = cost[s >> K] + metric[INDEX_OF<PHASE>.of[s]];
#pragma unroll
    for (int p = 1; p < KEYS; p++) best = min(best, cost[p << (6 - K) | s >> K] + metric[INDEX_OF<PHASE>.of[p << 6 | s]]);
    best = min(best, TOP);                                           // saturated sums are equal: the first predecessor has it
    w[s * C::ORIGIN / 32] = __funnelshift_r(w[s * C::ORIGIN / 32], best, C::ORIGIN);
    after[s] = (best & ~15u) | s >> (6 - NEXT);
  }
#pragma unroll
  for (int s = 0; s < STATES; s++) cost[s] = after[s];
}
DI void put(u32* to, const u32 (&w)[C::WORDS]) {
#pragma unroll
  for (int i = 0; i < C::WORDS / 4; i++) ((uint4*)to)[i] = make_uint4(w[4 * i], w[4 * i + 1], w[4 * i + 2], w[4 * i + 3]);
}
// w[i], by selections: the compiler would rather keep w in local memory.
DI u32 either(u32 bit, u32 a, u32 b) { u32 r; asm("{.reg .pred p; setp.ne.u32 p,%3,0; selp.u32 %0,%2,%1,p;}" : "=r"(r) : "r"(a), "r"(b), "r"(bit)); return r; }
DI u32 word_of(const u32 (&w)[C::WORDS], u32 i) {
  u32 v[C::WORDS];
#pragma unroll
  for (int j = 0; j < C::WORDS; j++) v[j] = w[j];
#pragma unroll
  for (int n = C::WORDS / 2, b = 0; n > 0; n /= 2, b++)
#pragma unroll
    for (int j = 0; j < n; j++) v[j] = either(i >> b & 1, v[2 * j], v[2 * j + 1]);
  return v[0];
}
// Inputs of one vector -> its symbols, in the lower bytes, and levels + ZERO, in the upper; returns the first state.
DI u32 search(u16* row, const signed char* levels, u32* origins, const TrellisFoldArgs& P) {
  u32 cost[STATES], w[C::WORDS] = {}; const long long stride = (long long)C::WORDS * THREADS;
#pragma unroll
  for (int s = 0; s < STATES; s++) cost[s] = TOP | s >> (6 - C::EVEN);
#pragma unroll
  for (int s = 0; s < STATES; s++)
#pragma unroll
    for (int i = 0; i < 4; i++) if (P.start[i] == s) cost[s] = s >> (6 - C::EVEN);
#pragma unroll 1
  for (int t = 0; t < C::D; t += 2) {
    const u32 two = *(const u32*)(row + t);
    advance<0>(cost, (float)(short)two, P, w); put(origins + t * stride, w);
    advance<1>(cost, (float)(short)(two >> 16), P, w); put(origins + (t + 1) * stride, w);
    if ((t + 2) % RENORMALISE == 0) {
      u32 least = cost[0];
#pragma unroll
      for (int s = 1; s < STATES; s++) least = min(least, cost[s]);
#pragma unroll
      for (int s = 0; s < STATES; s++) cost[s] -= least & ~15u;
    }
  }
  u32 last = ~0u;
#pragma unroll
  for (int s = 0; s < STATES; s++) last = min(last, (cost[s] & ~15u) << 2 | s);  // the lower state on a tie
  u32 state = last & (STATES - 1); uint4 ahead[AHEAD][C::WORDS / 4];
  auto fetch = [&](int t) {
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
#pragma unroll
      for (int j = 0; j < C::WORDS / 4; j++) ahead[i][j] = ((const uint4*)(origins + (t + i) * stride))[j];
  };
  fetch(C::D - AHEAD);
#pragma unroll 1
  for (int t = C::D - AHEAD; t >= 0; t -= AHEAD) {
    u32 now[AHEAD][C::WORDS], pair = 0;
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
#pragma unroll
      for (int j = 0; j < C::WORDS / 4; j++) { const uint4 v = ahead[i][j]; now[i][4 * j] = v.x; now[i][4 * j + 1] = v.y; now[i][4 * j + 2] = v.z; now[i][4 * j + 3] = v.w; }
    if (t > 0) fetch(t - AHEAD);
#pragma unroll
    for (int i = AHEAD - 1; i >= 0; i--) {
      const int k = i & 1 ? C::ODD : C::EVEN; const u32 at = state * C::ORIGIN;
      const u32 window = (word_of(now[i], at >> 5) >> (at & 31) & ((1u << C::ORIGIN) - 1)) << 6 | state;
      const u32 both = (u32)(levels[(i & 1 ? STATES << C::EVEN : 0) + window] + ZERO) << 8 | (state & ((1u << k) - 1));
      if (i & 1) pair = both << 16; else *(u32*)(row + t + i) = pair | both;
      state = window >> k;
    }
  }
  return state;
}
// Symbols of one lane's run of coordinates of several tokens, as one stream of bits (trellis.cuh). Two threads to a stream.
DI void pack(const u16* rows, unsigned char* codes) {
  constexpr int COUNT = C::V ? 16 : 8, RUN = C::D / (C::V ? 8 : 4), PAIR = pair_bits(C::F), WORDS = Runs<C::F, COUNT, RUN>::WORDS, PIECE = Runs<C::F, COUNT, RUN>::PIECE;
  const int half = threadIdx.x >> 6, part = threadIdx.x >> 5 & 1, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3; u32 bits = 0; int held = 0, word = part * (WORDS / 2);
#pragma unroll 1
  for (int u = part * (COUNT / 2); u < (part + 1) * (COUNT / 2); u++) {
    const int token = C::V ? 8 * (4 * (u >> 3) + (u & 3)) + t + 4 * (u >> 2 & 1) : 8 * u + g;
    const u32* from = (const u32*)(rows + (half * HALF_TOKENS + token) * C::ROW + (C::V ? g : t) * RUN);
#pragma unroll 1
    for (int c = 0; c < RUN / 2; c++) {
      const u32 two = from[c], pair = (two & 15) << C::ODD | (two >> 16 & 15); const int over = held + PAIR - 32;
      if (over < 0) { bits = bits << PAIR | pair; held += PAIR; continue; }
      *(u32*)(codes + half * C::HALF + (word / PIECE * 32 + lane) * PIECE * 4 + word % PIECE * 4) = bits << (PAIR - over) | pair >> over;
      word++; bits = pair; held = over;                              // what is above `held` bits is shifted out
    }
  }
}
// Word `run` of a step of a computed code, before step 0 from the start states; lane, half as in computed.cuh.
DI u32 step_word(const u16* rows, const u8* start, const TrellisFoldArgs& P, int half, int lane, int run, int s) {
  using R = Words<C::EVEN, C::D, C::V>; const int g = lane >> 2, t = lane & 3; u32 word = 0;
#pragma unroll
  for (int b = 0; b < 4; b++)
#pragma unroll
    for (int j = 0; j < R::FIELDS; j++) {
      const int token = half * HALF_TOKENS + R::token(run, b, j, g, t), at = R::coordinate(s, b, g, t);
      const u32 symbol = at >= 0 ? rows[token * C::ROW + at] & 15u : P.start[start[token]] >> (-1 - at) * R::K & R::M;
      word |= symbol << (8 * b + 8 / R::FIELDS * j + R::FIRST);
    }
  return word;
}
DI void pack_words(const u16* rows, const u8* start, const TrellisFoldArgs& P, unsigned char* codes) {
  using R = Words<C::EVEN, C::D, C::V>;
#pragma unroll 1
  for (int e = threadIdx.x; e < 2 * R::HELD * 32; e += THREADS) {
    const int half = e / (R::HELD * 32), lane = e & 31, i = e / 32 % R::HELD; u32 word;
    auto of = [&](int run, int s) { return step_word(rows, start, P, half, lane, run, s); };
    if constexpr (R::K == 2) word = C::V ? of(0, i) : of(i & 1, 2 * (i >> 2) + (i >> 1 & 1));
    else {                                                           // three words and a plane of the fourth in each one's spare bits 0
      const int group = i / 3, c = i % 3; const u32 last = C::V ? of(1, 2 * group + 1) : of(3, group);
      word = (C::V ? of(c & 1, 2 * group + (c >> 1)) : of(c, group)) | (last >> (c + 1) & SPARE);
    }
    *(u32*)(codes + half * C::HALF + (i / 4 * 32 + lane) * 16 + i % 4 * 4) = word;
  }
  {                                                                  // one byte of the start words per thread
    const int half = threadIdx.x >> 6, e = threadIdx.x & 63, row = C::V ? e >> 4 : e >> 3, at = C::V ? e >> 2 & 3 : e & 7, byte = C::V ? e & 3 : 0; u32 word = 0;
    if (at < R::LINKS * R::RUNS) word = step_word(rows, start, P, half, C::V ? row : 4 * row, at % R::RUNS, -1 - at / R::RUNS);
    codes[half * C::HALF + 4 * C::D * pair_bits(C::F) + 64 + e] = (u8)(word >> 8 * byte);
  }
}
DI void fold_one(const TrellisFoldArgs& P, int page, int head, u32* origins, unsigned char* sm) {
  constexpr int N = C::N; u16* rows = (u16*)sm; signed char* levels = (signed char*)(rows + TOKENS * C::ROW); float *mean = (float*)(levels + C::WINDOWS), *work = mean + 2 * C::D;
  float* wanted = work + 2 * C::D; u8* start = (u8*)(wanted + TOKENS);
  const u64 at = P.page[page]; unsigned char* out = (unsigned char*)(at & ~1ull) + (u64)head * C::BYTES;
  const u16* in = (const u16*)P.x + page * P.x_p + head * P.x_h; const int sinks = at & 1 ? P.sinks : 0;
  u32 mean_scale[2] = {0, 0};
  if constexpr (!C::V && C::MEAN) page_means<C, THREADS>([&](int t, int d) { return low<C::H16>(__ldg(in + t * P.x_t + d)); }, mean, work, out, sinks, mean_scale);
  const int lane = threadIdx.x & 31, k = lane & 7, first = (threadIdx.x >> 5) * 4 + (lane >> 3); float sign[N]; bool bad = false;
#pragma unroll
  for (int j = 0; j < N; j++) sign[j] = P.sign[head * C::D + 8 * j + k];
  auto turned = [&](int token, float (&y)[N]) {                      // rotated and of unit variance; returns the root mean square before
    float w[N];
#pragma unroll
    for (int j = 0; j < N; j++) { float x = low<C::H16>(__ldg(in + token * P.x_t + 8 * j + k)); if (!C::V && C::MEAN) x = sub(x, mean[(token >> 6) * C::D + 8 * j + k]); y[j] = mul(sign[j], x); }
    butterflies<N>(y, k);
#pragma unroll
    for (int j = 0; j < N; j++) w[j] = mul(y[j], y[j]);
    const float r = __fsqrt_rn(__fdiv_rn(tree<N>(w), (float)C::D)), inv = r > 0 ? __fdiv_rn(1.f, r) : 0.f;
#pragma unroll
    for (int j = 0; j < N; j++) y[j] = mul(y[j], inv);
    return r;
  };
#pragma unroll 1
  for (int token = first; token < TOKENS; token += THREADS / 8) {
    float y[N]; const float r = turned(token, y); bad |= !(r < __int_as_float(0x7f800000));
#pragma unroll
    for (int j = 0; j < N; j++) rows[token * C::ROW + 8 * j + k] = (u16)(short)(int)fminf(fmaxf(rintf(mul(y[j], P.gain)), -P.clip), P.clip);
  }
  __syncthreads();
  const u32 state = search(rows + threadIdx.x * C::ROW, levels, origins + threadIdx.x * C::WORDS, P);
  start[threadIdx.x] = (u8)((state > P.start[0]) + (state > P.start[1]) + (state > P.start[2]));
  __syncthreads();
#pragma unroll 1
  for (int token = first; token < TOKENS; token += THREADS / 8) {
    float y[N], q[N]; const float r = turned(token, y), rn = mul(r, P.inv_sqrt_d);
#pragma unroll
    for (int j = 0; j < N; j++) { const float level = (float)((int)(rows[token * C::ROW + 8 * j + k] >> 8) - ZERO); y[j] = mul(y[j], level); q[j] = mul(level, level); }
    const float dot = tree<N>(y), square = tree<N>(q), s = scale_of(P.rule, rn, (float)C::D, P.step, dot, square);
    if (k == 0) wanted[token] = r > 0 ? s : 0.f;
  }
  __syncthreads();
  float top = 0;
#pragma unroll
  for (int i = 0; i < TOKENS / 32; i++) if (i * 32 + lane >= sinks) top = fmaxf(top, wanted[i * 32 + lane]);
#pragma unroll
  for (int s = 1; s < 32; s *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, s));
  const u32 unit = float_half(__fdiv_rn(top, FULL)); bad |= (unit & 0x7c00u) == 0x7c00u;
  unsigned char* codes = out + (C::V ? C::K_HALF : C::MEAN_BYTES);
  {
    const int e = threadIdx.x, g = e & 7, i = e >> 3 & 7; const float s = wanted[e];
    const u32 code = s > 0 ? (u32)fminf(rintf(__fdiv_rn(s, half_float(unit))), MOST) : 0u; unsigned char* scales = codes + (e >> 6) * C::HALF + 4 * C::D * pair_bits(C::F);
    if constexpr (is_computed(C::F)) scales[g * 8 + i] = (u8)(code | ((!C::V && C::MEAN && g & 1 ? mean_scale[e >> 6] : unit) >> 2 * i & 3) << 6);
    else {
      const u32 more = i < 2 ? unit >> 8 * i : i < 4 ? mean_scale[e >> 6] >> 8 * (i - 2) : 0u;
      ((u16*)scales)[g * 8 + i] = (u16)(code | start[e] << 6 | (more & 255) << 8);
    }
  }
  if constexpr (is_computed(C::F)) pack_words(rows, start, P, codes); else pack(rows, codes);
  if (bad) *P.nonfinite = 1;
  __syncthreads();
}
extern "C" __global__ void __launch_bounds__(THREADS, 2) kvfold_fold_trellis(const __grid_constant__ TrellisFoldArgs P) {
  extern __shared__ __align__(128) unsigned char sm[];
  for (int i = threadIdx.x; i < C::WINDOWS; i += THREADS) ((signed char*)sm)[TOKENS * C::ROW * 2 + i] = P.window_levels[i];
  __syncthreads();
  u32* origins = P.origins + (u64)blockIdx.x * C::D * C::WORDS * THREADS;
#pragma unroll 1
  for (int n = blockIdx.x; n < P.pages * P.heads; n += gridDim.x) if (P.page[n / P.heads] != 0) fold_one(P, n / P.heads, n % P.heads, origins, sm);
}
extern "C" __device__ const int kvfold_fold_trellis_info[1] = {C::SMEM};
