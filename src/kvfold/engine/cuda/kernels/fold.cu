// 128 tokens of one KV head -> one side (keys or values) of a page in fragment order: centre, rotate, encode, scale, pack. One read, one write.
//   y = H(s (x - mean)); r = |y| / sqrt(D); code_j = #{thresholds < y_j / r}; scale by rule. Canonical float32 order, no contraction: bytes equal
//   the canonical encoder's. Grid (pages, heads, 2), 2 D threads. Limits: D 64, 128, 256; 16-bit input.
// An odd address is that of a sequence's page 0, whose means leave out the sinks; a page with address 0 is not folded.
// D / 64 neighbouring lanes hold a token, 64 numbers each, so that nearly all of the rotation and of the sums is arithmetic in registers:
// number 4 i + b of lane k is dim 4 (LANES i + k) + b. Layout: formats.cuh. Bound: integer and FP32 pipes, then HBM.
#include "fold.cuh"
// Levels ascending. Edges: bits of the positive thresholds between them, doubled, so that the sign of a number fits below its own: at one, a negative
// number has passed it and a positive one has not, because a threshold belongs to the lower code.
struct Book { u32 edge[7]; float level[16], step; };
struct FoldArgs {
  const void *k, *v; const u64* page; const float *sign_k, *sign_v; int* nonfinite;
  long long k_p, k_h, k_t, v_p, v_h, v_t; int sinks, rule_k, rule_v, search_k, search_v; float inv_sqrt_d; Book key, value;
};
#ifndef VARIANT    // D, key format, value format, mean, float16
#define VARIANT 128, 4, 4, 1, 0
#endif
template <int D_, int KF_, int VF_, int MEAN_, int H16_> struct FoldCfg : Region<D_, KF_, VF_, MEAN_> {
  static constexpr int H16 = H16_, LANES = D_ / 64, THREADS = TOKENS * LANES, BLOCKS = 512 / THREADS;     // of a multiprocessor: 128 registers a thread
  static constexpr int ROW = D_ + (LANES == 4 ? 16 : 8), CODE_ROW = D_ + 16, CODE_COL = TOKENS + 16;
  static constexpr int CODES = TOKENS * CODE_ROW > D_ * CODE_COL ? TOKENS * CODE_ROW : D_ * CODE_COL;
  static constexpr int SMEM = TOKENS * ROW * 2 + CODES + 8 * 8 + 5 * D_ * 4 + TOKENS * 2 + 16;
};
constexpr int NUMBERS = 64, GROUPS = NUMBERS / 4;                      // of a lane; in groups of four dims side by side
struct Two { float dot, square; };
DI float sum(float a, float b) { return add(a, b); }
DI Two sum(Two a, Two b) { return {add(a.dot, b.dot), add(a.square, b.square)}; }
// f(0) + .. + f(15) by a halving tree: f(i) + f(i + 8) first.
template <int I, int STEP, class F> DI auto halves(const F& f) {
  if constexpr (STEP == GROUPS) return f(I); else return sum(halves<I, 2 * STEP>(f), halves<I + STEP, 2 * STEP>(f));
}
DI float shuffled(float x, int d) { return __shfl_xor_sync(~0u, x, d); }
DI Two shuffled(Two x, int d) { return {shuffled(x.dot, d), shuffled(x.square, d)}; }
// Sum of D numbers, the last four of every lane: f(i, b).
template <int LANES, class F> DI auto tree(const F& f) {
  decltype(f(0, 0)) v[4];
#pragma unroll
  for (int b = 0; b < 4; b++) v[b] = halves<0, 1>([&](int i) { return f(i, b); });
#pragma unroll
  for (int d = LANES / 2; d > 0; d /= 2)
#pragma unroll
    for (int b = 0; b < 4; b++) v[b] = sum(v[b], shuffled(v[b], d));
  return sum(sum(v[0], v[2]), sum(v[1], v[3]));
}
template <int H> DI void butterfly(float (&y)[NUMBERS]) {
#pragma unroll
  for (int j = 0; j < NUMBERS; j++) if (!(j & H)) { const float a = y[j], b = y[j + H]; y[j] = add(a, b); y[j + H] = sub(a, b); }
}
// H y, not normalised: dims 1 and 2 apart, those of other lanes, those farther apart.
template <int LANES> DI void butterflies(float (&y)[NUMBERS], int k) {
  butterfly<1>(y); butterfly<2>(y);
#pragma unroll
  for (int d = 1; d < LANES; d *= 2) {
    const float side = k & d ? -1.f : 1.f;
#pragma unroll
    for (int j = 0; j < NUMBERS; j++) y[j] = __fmaf_rn(y[j], side, shuffled(y[j], d));    // a product with 1 or -1 is exact
  }
  butterfly<4>(y); butterfly<8>(y); butterfly<16>(y); butterfly<32>(y);
}
// Whether edges at 3 bits are passed by halves: as many instructions as one after the other, of which ptxas spills 460 bytes for Blackwell; by halves, 84 below it.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool HALVES_AT_3 = true;
#else
constexpr bool HALVES_AT_3 = false;
#endif
// first + step for every edge that |u| has passed.
template <int B> DI u32 passed(const Book& book, float u, u32 first, u32 step) {
  const u32 a = __funnelshift_l(__float_as_uint(u), __float_as_uint(u), 1), *edge = book.edge; u32 n = first;
  if constexpr (B == 4) {                         // by halves: four instructions fewer
    const bool upper = a > edge[3]; const u32 quarter = upper ? edge[5] : edge[1];
    const bool higher = a > quarter; const u32 low = higher ? edge[2] : edge[0], high = higher ? edge[6] : edge[4], eighth = upper ? high : low;
    n += (upper ? 4 * step : 0) + (higher ? 2 * step : 0) + (a > eighth ? step : 0);
  } else if constexpr (B == 3 && HALVES_AT_3) {
    const bool upper = a > edge[1]; n += upper ? 2 * step : 0;
    n += a > (upper ? edge[2] : edge[0]) ? step : 0;
  } else {
#pragma unroll
    for (int i = 0; i < (1 << (B - 1)) - 1; i++) n = a > edge[i] ? first + (i + 1) * step : n;
  }
  return n;
}
// Four codes in the bytes of x to four fields of a 16-bit half word.
DI u32 nibbles(u32 x) { x = (x | x >> 4) & 0x00ff00ffu; return (x | x >> 8) & 0xffffu; }
// Word i of a group of 32 codes; four(m) = codes of register m (0..7) of the group's two A fragments, one per byte.
template <int F, class Four> DI u32 make_word(int i, Four four) {
  if constexpr (F == 4) return nibbles(four(2 * i)) | nibbles(four(2 * i + 1)) << 16;
  if constexpr (F == 3) {
    u32 x = nibbles(four(2 * i)) | nibbles(four(2 * i + 1)) << 16, y = nibbles(four(6)) | nibbles(four(7)) << 16;
    return x | ((y >> i) & 0x11111111u) << 3;
  }
  return nibbles(four(4 * i)) | nibbles(four(4 * i + 1)) << 16 | (nibbles(four(4 * i + 2)) | nibbles(four(4 * i + 3)) << 16) << 2;
}
template <class C, int F, int V> DI void pack(const unsigned char* codes, const u16* scales, const u32 (&hidden)[2], unsigned char* out) {
  constexpr int B = bits_of(F), NW = C::D * B / 16, PIECES = NW / 4; const int skip = C::HALF;
  for (int e = threadIdx.x; e < 2 * PIECES * 32; e += C::THREADS) {
    const int half = e / (PIECES * 32), piece = e / 32 % PIECES, lane = e & 31, g = lane >> 2, t = lane & 3; u32 w[4];
#pragma unroll
    for (int q = 0; q < 4; q++) {
      const int word = piece * 4 + q;
      auto key = [&](int tile, int step, int r) { return *(const u32*)(codes + (half * 64 + 16 * tile + g + 8 * (r & 1)) * C::CODE_ROW + 32 * step + 4 * t + 16 * (r >> 1)); };
      auto value = [&](int tile, int f, int r) { return *(const u32*)(codes + ((C::D / 8) * g + 2 * tile + (r & 1)) * C::CODE_COL + half * 64 + f * 32 + (t + 4 * (r >> 1)) * 4); };
      if constexpr (F == 1) {
        const int u = word / 4, r = word % 4; w[q] = 0;
#pragma unroll
        for (int j = 0; j < 4; j++) w[q] |= (V ? value(4 * (u / 2) + j, u % 2, r) : key(j, u, r)) << (2 * j);
      } else {
        const int group = word / B;
        w[q] = make_word<F>(word % B, [&](int m) { return V ? value(group, m >> 2, m & 3) : key(group / (C::D / 64), 2 * (group % (C::D / 64)) + (m >> 2), m & 3); });
      }
    }
    *(uint4*)(out + half * skip + piece * 512 + lane * 16) = make_uint4(w[0], w[1], w[2], w[3]);
  }
  for (int e = threadIdx.x; e < TOKENS; e += C::THREADS) {
    const int g = e & 7, i = e >> 3 & 7, sign = g < 4 && i < 4 ? (e < 64 ? hidden[0] : hidden[1]) >> (4 * g + i) & 1 : 0;
    ((u16*)(out + (e >> 6) * skip + NW * 128))[g * 8 + i] = scales[e] | sign << 15;
  }
}
template <class C, int F, int V> DI void fold_side(const FoldArgs& P, unsigned char* sm) {
  constexpr int B = bits_of(F), L = C::LANES, HIGHER = 1 << (B - 1);
  u16* tile = (u16*)sm; unsigned char* codes = sm + TOKENS * C::ROW * 2; Two* level = (Two*)(codes + C::CODES);     // |level|, level^2 beyond n thresholds
  float *signs = (float*)(level + 8), *mean = signs + C::D, *work = mean + 2 * C::D; u16* scales = (u16*)(work + 2 * C::D);
  const Book& book = V ? P.value : P.key; const int rule = V ? P.rule_v : P.rule_k, search = V ? P.search_v : P.search_k;
  unsigned char* out = (unsigned char*)(P.page[blockIdx.x] & ~1ull) + (u64)blockIdx.y * C::BYTES;
  const u16* in = V ? (const u16*)P.v + blockIdx.x * P.v_p + blockIdx.y * P.v_h : (const u16*)P.k + blockIdx.x * P.k_p + blockIdx.y * P.k_h;
  const long long stride = V ? P.v_t : P.k_t;
#pragma unroll 8
  for (int e = threadIdx.x; e < TOKENS * C::D / 8; e += C::THREADS) *(uint4*)(tile + e / (C::D / 8) * C::ROW + e % (C::D / 8) * 8) = ldg4(in + e / (C::D / 8) * stride + e % (C::D / 8) * 8);
  if (threadIdx.x < HIGHER) { const float x = book.level[HIGHER + threadIdx.x]; level[threadIdx.x] = {x, mul(x, x)}; }
  if (threadIdx.x < C::D) signs[threadIdx.x] = ((V ? P.sign_v : P.sign_k) + blockIdx.y * C::D)[threadIdx.x];
  __syncthreads();
  u32 hidden[2] = {0, 0};
  if constexpr (!V && C::MEAN) {
    page_means<C, C::THREADS>([&](int t, int d) { return low<C::H16>(tile[t * C::ROW + d]); }, mean, work, out, P.page[blockIdx.x] & 1 ? P.sinks : 0, hidden);
    for (int e = threadIdx.x; e < 2 * C::D; e += C::THREADS) work[e] = mul(-signs[e % C::D], mean[e]);
    __syncthreads();
  }
  const int token = threadIdx.x / L, k = threadIdx.x % L; float y[NUMBERS];
#pragma unroll
  for (int i = 0; i < GROUPS; i++) {
    const int dim = 4 * (L * i + k); const uint2 two = *(const uint2*)(tile + token * C::ROW + dim); const float4 s = *(const float4*)(signs + dim);
    const float x[4] = {low<C::H16>(two.x & 0xffffu), high<C::H16>(two.x), low<C::H16>(two.y & 0xffffu), high<C::H16>(two.y)}, sign[4] = {s.x, s.y, s.z, s.w};
    float4 m = {0, 0, 0, 0}; if constexpr (!V && C::MEAN) m = *(const float4*)(work + (token >> 6) * C::D + dim);
    const float shift[4] = {m.x, m.y, m.z, m.w};
#pragma unroll
    for (int b = 0; b < 4; b++) y[4 * i + b] = !V && C::MEAN ? __fmaf_rn(sign[b], x[b], shift[b]) : mul(sign[b], x[b]);      // sign (x - mean), rounded once
  }
  butterflies<L>(y, k);
  const float d = (float)C::D, r = __fsqrt_rn(__fdiv_rn(tree<L>([&](int i, int b) { return mul(y[4 * i + b], y[4 * i + b]); }), d));
  const float inv = r > 0 ? __fdiv_rn(1.f, r) : 0.f, rn = mul(r, P.inv_sqrt_d);
#pragma unroll
  for (int j = 0; j < NUMBERS; j++) y[j] = mul(y[j], inv);
  // <u, L> and |L|^2 of the codes of y times a factor; L has the signs of u.
  const u32 levels = shared_address(level);
  auto products = [&](float factor) {
    return tree<L>([&](int i, int b) {
      const float u = y[4 * i + b]; const uint2 l = lds2(passed<B>(book, mul(u, factor), levels, sizeof(Two)));
      return Two{mul(fabsf(u), __uint_as_float(l.x)), __uint_as_float(l.y)};
    });
  };
  Two best = products(1.f); float factor = 1, gain = __fdiv_rn(mul(best.dot, best.dot), best.square);
#pragma unroll 1
  for (int f = 1; f < search; f++) {              // the factor with the largest <u, L>^2 / |L|^2
    const float other = f == 1 ? .9f : 1.1f; const Two p = products(other); const float g = __fdiv_rn(mul(p.dot, p.dot), p.square);
    if (g > gain) { best = p; gain = g; factor = other; }
  }
#pragma unroll
  for (int i = 0; i < GROUPS; i++) {
    const int dim = 4 * (L * i + k), rest = token & 7; u32 word = 0;
#pragma unroll
    for (int b = 0; b < 4; b++) {
      const float u = mul(y[4 * i + b], factor); const int n = passed<B>(book, u, HIGHER, 1), code = u > 0 ? n : 2 * HIGHER - 1 - n;
      if constexpr (V) codes[(dim + b) * C::CODE_COL + (token & 96) + rest * 4 + (token >> 3 & 3)] = code;          // four tokens 8 apart side by side
      else word |= (u32)code << (8 * b);
    }
    if constexpr (!V) *(u32*)(codes + token * C::CODE_ROW + dim) = word;
  }
  const u32 h = float_half(r == 0 ? 0.f : scale_of(rule, rn, d, book.step, best.dot, best.square));
  if ((h & 0x7c00u) == 0x7c00u) *P.nonfinite = 1;
  if (k == 0) scales[token] = h;
  __syncthreads();
  pack<C, F, V>(codes, scales, hidden, out + (V ? C::K_HALF : C::MEAN_BYTES));
}
using Chosen = FoldCfg<VARIANT>;
extern "C" __global__ void __launch_bounds__(Chosen::THREADS, Chosen::BLOCKS) kvfold_fold(const __grid_constant__ FoldArgs P) {
  extern __shared__ __align__(128) unsigned char sm[];
  if (P.page[blockIdx.x] == 0) return;
  if (blockIdx.z == 0) fold_side<Chosen, Chosen::KF, 0>(P, sm); else fold_side<Chosen, Chosen::VF, 1>(P, sm);
}
extern "C" __device__ const int kvfold_fold_info[1] = {Chosen::SMEM};
