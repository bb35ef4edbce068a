// One new token per sequence into its exact ring: what a decode step does after its attention, without the host.
// Layout: k, v [B, H, 1, D], 16 bits; the token goes to slot (first + length - folded) % ring of each head's ring, and length grows by one.
// Grid: one block per sequence; a thread moves 16 bytes at a time. *nonfinite becomes 1 if a number is NaN or infinite.
// Bound: latency; some kB per sequence.
#include "ring.cuh"

struct AppendArgs { const void *k, *v; Sequence* seq; int* nonfinite; long long k_b, k_h, v_b, v_h; int H; };

template <int D, int H16> DI void append(const AppendArgs& P) {
  Sequence& s = P.seq[blockIdx.x]; const int length = s.length, slot = (s.first + length - s.folded) % s.ring;
  const u32 exponent = H16 ? 0x7c00u : 0x7f80u; bool wrong = false;
  for (int i = threadIdx.x; i < 2 * P.H * (D / 8); i += blockDim.x) {
    const int part = i % (D / 8), head = i / (D / 8) % P.H, value = i / (D / 8 * P.H);
    const long long from = blockIdx.x * (value ? P.v_b : P.k_b) + head * (value ? P.v_h : P.k_h);
    const uint4 x = ((const uint4*)((const u16*)(value ? P.v : P.k) + from))[part];
    ((uint4*)((u16*)(value ? s.recent_v : s.recent_k) + head * s.stride + (long long)slot * D))[part] = x;
    const u32 w[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int j = 0; j < 4; j++) wrong |= (w[j] & exponent) == exponent || (w[j] >> 16 & exponent) == exponent;
  }
  if (wrong) *P.nonfinite = 1;
  __syncthreads();                                // every thread has read the length
  if (threadIdx.x == 0) s.length = length + 1;
}
#ifndef VARIANT   // D, float16
#define VARIANT 128, 0
#endif
extern "C" __global__ void __launch_bounds__(256) kvfold_append(const __grid_constant__ AppendArgs P) { append<VARIANT>(P); }
extern "C" __device__ const int kvfold_append_info[1] = {0};
