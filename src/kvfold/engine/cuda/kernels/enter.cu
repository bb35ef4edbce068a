// A decode step enters a layer: what its requests read is gathered and described, then their new tokens are stored (enter.cuh). What requests read is
// read first, because a block may be read for the last time and written in the same step; no request reads what another stores in that step.
// Grid (requests, KV heads, 2 sides), 256 threads. Bound: latency; a block copies some 50 kB.
#define DI __device__ __forceinline__
#include "enter.cuh"
#ifndef VARIANT   // D
#define VARIANT 128
#endif
extern "C" __global__ void __launch_bounds__(256) kvfold_enter(const __grid_constant__ EnterArgs P) {
  gather<VARIANT>(P, blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, blockDim.x);
  __syncthreads();
  store<VARIANT>(P, blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, blockDim.x);
}
extern "C" __device__ const int kvfold_enter_info[1] = {0};
