// Walsh-Hadamard transform of vectors that 32 / FROM lanes hold, lanes FROM apart, N consecutive numbers each. Normalised by the caller.
#pragma once
#include "ptx.cuh"
template <int FROM, int N> DI void hadamard(float (&v)[N], int lane) {
#pragma unroll
  for (int h = 1; h < N; h *= 2)
#pragma unroll
    for (int i = 0; i < N; i++) if (!(i & h)) { float a = v[i], b = v[i + h]; v[i] = a + b; v[i + h] = a - b; }
#pragma unroll
  for (int d = FROM; d < 32; d *= 2)
#pragma unroll
    for (int i = 0; i < N; i++) { float o = __shfl_xor_sync(~0u, v[i], d); v[i] = lane & d ? o - v[i] : v[i] + o; }
}
