// 128 tokens of one KV head -> one side (keys or values) of a page in fragment order: centre, rotate, encode, scale, pack. One read, one write.
//   y = H(s (x - mean)); r = |y| / sqrt(D); code_j = #{thresholds < y_j / r}; scale by rule. Canonical float32 order, no contraction: bytes equal
//   the canonical encoder's. Grid (pages, heads, 2), 256 threads. Limits: D 64, 128, 256; 16-bit input.
// Layout: formats.cuh. Bound: integer and FP32 pipes (about 40 instructions per value), then HBM.
#include "fold.cuh"
struct Book { float threshold[15], level[16], step; };               // level ascending; thresholds between them
struct FoldArgs {
  const void *k, *v; const u64* page; const float *sign_k, *sign_v; int* nonfinite;
  long long k_p, k_h, k_t, v_p, v_h, v_t; int first_sinks, rule_k, rule_v, search_k, search_v; float inv_sqrt_d; Book key, value;
};
#ifndef VARIANT    // D, key format, value format, mean, float16
#define VARIANT 128, 4, 4, 1, 0
#endif
constexpr int THREADS = 256;
template <int D_, int KF_, int VF_, int MEAN_, int H16_> struct FoldCfg : Region<D_, KF_, VF_, MEAN_> {
  static constexpr int H16 = H16_, ROW = D_ + 8, N = D_ / 8, CODE_ROW = D_ + 16, CODE_COL = TOKENS + 16;
  static constexpr int CODES = TOKENS * CODE_ROW > D_ * CODE_COL ? TOKENS * CODE_ROW : D_ * CODE_COL;
  static constexpr int SMEM = TOKENS * ROW * 2 + CODES + 64 * 4 + 4 * D_ * 4 + TOKENS * 2 + 16;
};
template <int B> DI int encode(float u, const float* t) {            // thresholds are odd-symmetric: count on |u|, ties to the lower code
  const int negative = !(u > 0), a = (__float_as_int(u) & 0x7fffffff) + negative, half = 1 << (B - 1); int n = 0;
#pragma unroll
  for (int i = 0; i < (1 << (B - 1)) - 1; i++) n += a > __float_as_int(t[half + i]);
  return negative ? half - 1 - n : half + n;
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
  for (int e = threadIdx.x; e < 2 * PIECES * 32; e += THREADS) {
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
  for (int e = threadIdx.x; e < TOKENS; e += THREADS) {
    const int g = e & 7, i = e >> 3 & 7, sign = g < 4 && i < 4 ? (e < 64 ? hidden[0] : hidden[1]) >> (4 * g + i) & 1 : 0;
    ((u16*)(out + (e >> 6) * skip + NW * 128))[g * 8 + i] = scales[e] | sign << 15;
  }
}
template <class C, int F, int V> DI void fold_side(const FoldArgs& P, unsigned char* sm) {
  u16* tile = (u16*)sm; unsigned char* codes = sm + TOKENS * C::ROW * 2; float *table = (float*)(codes + C::CODES), *mean = table + 64, *work = mean + 2 * C::D; u16* scales = (u16*)(work + 2 * C::D);
  constexpr int B = bits_of(F), N = C::N;
  const Book& book = V ? P.value : P.key; const float* signs = (V ? P.sign_v : P.sign_k) + blockIdx.y * C::D; const int rule = V ? P.rule_v : P.rule_k, search = V ? P.search_v : P.search_k;
  unsigned char* out = (unsigned char*)P.page[blockIdx.x] + (u64)blockIdx.y * C::BYTES;
  const u16* in = V ? (const u16*)P.v + blockIdx.x * P.v_p + blockIdx.y * P.v_h : (const u16*)P.k + blockIdx.x * P.k_p + blockIdx.y * P.k_h;
  const long long stride = V ? P.v_t : P.k_t;
  for (int e = threadIdx.x; e < TOKENS * C::D / 8; e += THREADS) *(uint4*)(tile + e / (C::D / 8) * C::ROW + e % (C::D / 8) * 8) = ldg4(in + e / (C::D / 8) * stride + e % (C::D / 8) * 8);
  if (threadIdx.x < 16) table[threadIdx.x] = book.level[threadIdx.x];
  __syncthreads();
  u32 hidden[2] = {0, 0};
  if constexpr (!V && C::MEAN)
    page_means<C, THREADS>([&](int t, int d) { return low<C::H16>(tile[t * C::ROW + d]); }, mean, work, out, blockIdx.x == 0 ? P.first_sinks : 0, hidden);
  const int lane = threadIdx.x & 31, k = lane & 7; float sign[N]; bool bad = false;
#pragma unroll
  for (int j = 0; j < N; j++) sign[j] = signs[8 * j + k];
#pragma unroll 1
  for (int token = (threadIdx.x >> 5) * 4 + (lane >> 3); token < TOKENS; token += THREADS / 8) {
    float y[N], w[N];
#pragma unroll
    for (int j = 0; j < N; j++) { float x = low<C::H16>(tile[token * C::ROW + 8 * j + k]); if (!V && C::MEAN) x = sub(x, mean[(token >> 6) * C::D + 8 * j + k]); y[j] = mul(sign[j], x); }
    butterflies<N>(y, k);
#pragma unroll
    for (int j = 0; j < N; j++) w[j] = mul(y[j], y[j]);
    const float d = (float)C::D, r = __fsqrt_rn(__fdiv_rn(tree<N>(w), d)), inv = r > 0 ? __fdiv_rn(1.f, r) : 0.f, rn = mul(r, P.inv_sqrt_d);
#pragma unroll
    for (int j = 0; j < N; j++) y[j] = mul(y[j], inv);
    float best = 0, dot = 0, square = 0; u32 chosen[N / 8];          // codes of the factor with the largest <u, L>^2 / |L|^2
#pragma unroll 1
    for (int f = 0; f < search; f++) {
      const float factor = f == 0 ? 1.f : f == 1 ? .9f : 1.1f; float q[N]; u32 tried[N / 8] = {};
#pragma unroll
      for (int j = 0; j < N; j++) {
        const int code = encode<B>(mul(y[j], factor), book.threshold); const float level = table[code];
        tried[j / 8] |= (u32)code << (j % 8 * 4); w[j] = mul(y[j], level); q[j] = mul(level, level);
      }
      const float a = tree<N>(w), b = tree<N>(q), gain = __fdiv_rn(mul(a, a), b);
      if (f == 0 || gain > best) {
        best = gain; dot = a; square = b;
#pragma unroll
        for (int j = 0; j < N / 8; j++) chosen[j] = tried[j];
      }
    }
    const float s = scale_of(rule, rn, d, book.step, dot, square);
#pragma unroll
    for (int j = 0; j < N; j++) {
      const int code = chosen[j / 8] >> (j % 8 * 4) & 15, dim = 8 * j + k, rest = token & 7;
      if constexpr (V) codes[dim * C::CODE_COL + (token & 96) + rest * 4 + (token >> 3 & 3)] = code;          // four tokens 8 apart side by side
      else codes[token * C::CODE_ROW + dim] = code;
    }
    const u32 h = float_half(r == 0 ? 0.f : s); bad |= (h & 0x7c00u) == 0x7c00u;
    if (k == 0) scales[token] = h;
  }
  if (bad) *P.nonfinite = 1;
  __syncthreads();
  pack<C, F, V>(codes, scales, hidden, out + (V ? C::K_HALF : C::MEAN_BYTES));
}
using Chosen = FoldCfg<VARIANT>;
extern "C" __global__ void __launch_bounds__(THREADS, 2) kvfold_fold(const __grid_constant__ FoldArgs P) {
  extern __shared__ __align__(128) unsigned char sm[];
  if (blockIdx.z == 0) fold_side<Chosen, Chosen::KF, 0>(P, sm); else fold_side<Chosen, Chosen::VF, 1>(P, sm);
}
extern "C" __device__ const int kvfold_fold_info[1] = {Chosen::SMEM};
