// What both kinds of fold share: float32 arithmetic in the canonical encoder's order, without contraction; means of keys; scales.
#pragma once
#include "formats.cuh"
constexpr int TOKENS = 128, HALF_TOKENS = 64;
DI float add(float a, float b) { return __fadd_rn(a, b); }
DI float sub(float a, float b) { return __fsub_rn(a, b); }
DI float mul(float a, float b) { return __fmul_rn(a, b); }
// Means of a page's halves, exactly as stored, without the first `sinks` tokens: dequantized in mean[2][D], codes in the page, their float16 scales in
// `scale`. at(token, dim) is a key's number; work: 2 D floats. The whole block of THREADS takes part.
template <class C, int THREADS, class At> DI void page_means(At at, float* mean, float* work, unsigned char* out, int sinks, u32 (&scale)[2]) {
#pragma unroll 1
  for (int e = threadIdx.x; e < 2 * C::D; e += THREADS) {
    const int half = e / C::D, d = e % C::D;
    auto sum = [&](auto kept) {
      float a[HALF_TOKENS / 2];
#pragma unroll
      for (int i = 0; i < HALF_TOKENS / 2; i++) a[i] = add(kept(i), kept(i + HALF_TOKENS / 2));
#pragma unroll
      for (int s = 4; s <= HALF_TOKENS; s *= 2)
#pragma unroll
        for (int i = 0; i < HALF_TOKENS / s; i++) a[i] = add(a[i], a[i + HALF_TOKENS / s]);
      return a[0];
    };
    if (sinks > half * HALF_TOKENS) work[e] = sum([&](int t) { return half * HALF_TOKENS + t < sinks ? 0.f : at(half * HALF_TOKENS + t, d); });
    else work[e] = sum([&](int t) { return at(half * HALF_TOKENS + t, d); });
  }
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int gone = sinks - half * HALF_TOKENS > 0 ? sinks - half * HALF_TOKENS : 0; const float count = (float)(gone < HALF_TOKENS ? HALF_TOKENS - gone : 1);
    float top = 0;
    for (int i = 0; i < C::D / 32; i++) top = fmaxf(top, fabsf(work[half * C::D + i * 32 + (threadIdx.x & 31)]));
#pragma unroll
    for (int s = 1; s < 32; s *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, s));
    scale[half] = float_half(__fdiv_rn(__fdiv_rn(top, count), 127.f));   // division is monotonous: the largest sum gives the largest mean
    const float s = half_float(scale[half]);
#pragma unroll 1
    for (int d = threadIdx.x; d < C::D; d += THREADS) {
      const float m = __fdiv_rn(work[half * C::D + d], count), c = s > 0 ? fminf(fmaxf(rintf(__fdiv_rn(m, s)), -127.f), 127.f) : 0.f;
      mean[half * C::D + d] = mul(s, c);
      out[half * C::HALF + (d >> 2 & 3) * (C::D / 4) + (d >> 4) * 4 + (d & 3)] = (unsigned char)(int)c;
    }
    if (threadIdx.x < C::MEAN_BYTES - C::D) out[half * C::HALF + C::D + threadIdx.x] = 0;
  }
  __syncthreads();
}
// A vector's scale by rule: "norm", "unbiased", "least-squares", or the one that keeps its length (config.SCALES). rn: its root mean square in levels' units.
DI float scale_of(int rule, float rn, float d, float step, float dot, float square) {
  return rule == 0 ? mul(rn, step) : rule == 1 ? __fdiv_rn(mul(rn, d), dot) : rule == 2 ? __fdiv_rn(mul(rn, dot), square) : mul(rn, __fsqrt_rn(__fdiv_rn(d, square)));
}
