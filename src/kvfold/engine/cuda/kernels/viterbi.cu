// The cheapest path of each vector through a trellis code: codec/trellis.py's `viterbi`, equal to the bit.
// Layout: inputs int32 [N, D], symbols u8 [N, D], first states u8 [N]. One warp per vector; lane l holds the costs of states 2 l and 2 l + 1, which
// are entered from the same states. Way back: half a byte per step and state in shared memory. Limits: D a multiple of 8, widths 1 to 4.
// Bound: the integer pipe, about 20 operations for each of 64 2^k branches of a step.
#include "ptx.cuh"
struct Args { const int* x; u8 *symbols, *first; const int *level0, *level1; long long count; u64 starts; int shift; };      // levels of windows, in input units
#ifndef VARIANT    // D, bits of even steps, bits of odd steps
#define VARIANT 128, 3, 4
#endif
constexpr int WARPS = 8, STATES = 64, TOP = 65535, ERROR_TOP = 255, RENORMALISE = 16;
template <int D_, int EVEN_, int ODD_> struct Cfg { static constexpr int D = D_, EVEN = EVEN_, ODD = ODD_, WAY = D_ * 32, SMEM = WARPS * (WAY + D_); };

template <int K> DI void load_levels(int (&level)[1 << K][2], const int* from, int lane) {
#pragma unroll
  for (int p = 0; p < 1 << K; p++)
#pragma unroll
    for (int j = 0; j < 2; j++) level[p][j] = __ldg(from + p * STATES + 2 * lane + j);
}
// One step: costs (two 16-bit numbers) after it, and where each state came from.
template <int K> DI u32 step(u32 cost, const int (&level)[1 << K][2], int x, int shift, int lane, u32& origin) {
  u32 best[2] = {~0u, ~0u};
#pragma unroll
  for (int p = 0; p < 1 << K; p++) {
    const int from = p * (STATES >> K) + (lane >> (K - 1));           // the state before, of either of this lane's
    const u32 both = __shfl_sync(~0u, cost, from >> 1), old = from & 1 ? both >> 16 : both & 0xffffu;
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int e = min(abs(x - level[p][j]), ERROR_TOP); const u32 sum = min(old + ((u32)(e * e) >> shift), (u32)TOP);
      best[j] = min(best[j], sum << 4 | p);       // the lower p on a tie
    }
  }
  origin = (best[0] & 15) | (best[1] & 15) << 4;
  return best[0] >> 4 | best[1] >> 4 << 16;
}
template <class C> DI void search(const Args& P) {
  extern __shared__ u8 sm[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5; const long long n = (long long)blockIdx.x * WARPS + warp;
  if (n >= P.count) return;
  u8 *way = sm + warp * (C::WAY + C::D), *path = way + C::WAY;
  int even[1 << C::EVEN][2], odd[1 << C::ODD][2]; load_levels<C::EVEN>(even, P.level0, lane); load_levels<C::ODD>(odd, P.level1, lane);
  u32 cost = (P.starts >> (2 * lane) & 1 ? 0u : (u32)TOP) | (P.starts >> (2 * lane + 1) & 1 ? 0u : (u32)TOP << 16), origin;
  const int* x = P.x + n * C::D;
#pragma unroll 1
  for (int t0 = 0; t0 < C::D; t0 += 32) {
    const int mine = t0 + lane < C::D ? __ldg(x + t0 + lane) : 0, stop = C::D - t0 < 32 ? C::D - t0 : 32;
#pragma unroll 1
    for (int i = 0; i < stop; i += 2) {
      cost = step<C::EVEN>(cost, even, __shfl_sync(~0u, mine, i), P.shift, lane, origin); way[(t0 + i) * 32 + lane] = (u8)origin;
      cost = step<C::ODD>(cost, odd, __shfl_sync(~0u, mine, i + 1), P.shift, lane, origin); way[(t0 + i + 1) * 32 + lane] = (u8)origin;
      if ((i + 2) % RENORMALISE == 0) { const u32 least = __reduce_min_sync(~0u, min(cost & 0xffffu, cost >> 16)); cost -= least | least << 16; }
    }
  }
  u32 state = __reduce_min_sync(~0u, min((cost & 0xffffu) << 6 | (u32)(2 * lane), (cost >> 16) << 6 | (u32)(2 * lane + 1))) & (STATES - 1);
  __syncwarp();
  if (lane == 0) {
#pragma unroll 1
    for (int t = C::D - 1; t >= 0; t--) {
      const int k = t & 1 ? C::ODD : C::EVEN; path[t] = (u8)(state & ((1u << k) - 1));
      state = ((u32)(way[t * 32 + (state >> 1)] >> (state & 1) * 4 & 15) << 6 | state) >> k;
    }
    P.first[n] = (u8)state;
  }
  __syncwarp();
  for (int i = lane; i < C::D / 4; i += 32) ((u32*)(P.symbols + n * C::D))[i] = ((const u32*)path)[i];
}
using Chosen = Cfg<VARIANT>;
extern "C" __global__ void __launch_bounds__(WARPS * 32) kvfold_viterbi(const __grid_constant__ Args P) { search<Chosen>(P); }
extern "C" __device__ const int kvfold_viterbi_info[1] = {Chosen::SMEM};
