// Pages in fragment order -> 16-bit keys and values in the rotated basis, a bounded tile of the history at a time (prefill).
//   K = s L + R mean, V = s L; rotated query and output are the caller's business. Grid (pages, heads, 4: half x side), 128 threads.
// Layout: formats.cuh; out [H, tokens, D]. Limits: D 64, 128, 256. Bound: HBM writes.
#include "hadamard.cuh"
#include "computed.cuh"
struct UnfoldArgs { const u64* page; void *k, *v; const float* sign_k; long long head; Levels key, value; const u32 *key_pairs, *value_pairs; };        // head: stride in elements
#ifndef VARIANT    // D, key format, value format, mean, float16
#define VARIANT 128, 4, 4, 1, 0
#endif
template <int D_, int KF_, int VF_, int MEAN_, int H16_> struct UnfoldCfg : Region<D_, KF_, VF_, MEAN_> {
  static constexpr int H16 = H16_, ROW = D_ + 8, SMEM = 64 * ROW * 2 + D_ * 4 + 64 * 4;
};
// Rotated mean of one half page by warp 0; scale from the signs of K scales.
template <class C> DI void rotated_mean(float* mean, const unsigned char* half, const u16* scales, const float* sign, int lane) {
  constexpr int N = C::D / 32; float v[N];
  const float scale = is_computed(C::KF) ? half_low(spares(((const uint2*)scales)[1])) : is_trellis(C::KF) ? held_half((u32)scales[2] | (u32)scales[3] << 16) : half_low(__ballot_sync(~0u, scales[(lane >> 2) * 8 + (lane & 3)] >> 15));
#pragma unroll
  for (int i = 0; i < N; i++) { const int d = lane * N + i; v[i] = (float)(signed char)half[(d >> 2 & 3) * (C::D / 4) + (d >> 4) * 4 + (d & 3)] * scale * sign[d]; }
  hadamard<1>(v, lane);
#pragma unroll
  for (int i = 0; i < N; i++) mean[lane * N + i] = v[i] * rsqrtf((float)C::D);
}
template <class C, int F, int V> DI void unfold_side(const UnfoldArgs& P, unsigned char* sm, int half) {
  constexpr int B = bits_of(F), CODES = 4 * C::D * pair_bits(F); u16* tile = (u16*)sm; float* mean = (float*)(sm + 64 * C::ROW * 2);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const unsigned char* from = (const unsigned char*)P.page[blockIdx.x] + (u64)blockIdx.y * C::BYTES + half * C::HALF;
  const unsigned char* codes = from + (V ? C::K_HALF : C::MEAN_BYTES); const u16* scales = (const u16*)(codes + CODES);
  if (!V && C::MEAN && warp == 0) rotated_mean<C>(mean, from, scales, P.sign_k + blockIdx.y * C::D, lane);
  float* scale = mean + C::D;
  if (threadIdx.x < 64) {
    const u32 s = scales[threadIdx.x];
    scale[(threadIdx.x & 7) * 8 + (threadIdx.x >> 3)] = is_computed(F) ? half_low(spares(*(const uint2*)scales)) * (float)(((const u8*)scales)[threadIdx.x] & 63) : is_trellis(F) ? held_half((u32)scales[0] | (u32)scales[1] << 16) * (float)(s & 63) : half_low(s & 0x7fffu);
  }
  __syncthreads();
  auto put = [&](int token, int dim, int level) {
    float x = scale[token] * (float)level; if (!V && C::MEAN) x += mean[dim];
    tile[token * C::ROW + dim] = (u16)pair<C::H16>(x, 0.f);
  };
  if constexpr (is_computed(F)) {
    using R = Words<pair_bits(F) / 2, C::D, V>; R words;
#pragma unroll
    for (int i = 0; i < R::HELD; i++) words.w[i] = *(const u32*)(codes + (i / 4 * 32 + lane) * 16 + i % 4 * 4);
    words.connect((const unsigned char*)(scales + 32), lane);
#pragma unroll
    for (int s = 0; s < R::STEPS; s++) {
      if ((s & 3) != warp) continue;              // the same for all lanes of a warp
#pragma unroll
      for (int run = 0; run < R::RUNS; run++) {
        u32 x, y; words.fields(run, s, x, y);
#pragma unroll
        for (int b = 0; b < 4; b++)
#pragma unroll
          for (int j = 0; j < R::FIELDS; j++) {
            const int at = 8 * b + 8 / R::FIELDS * j + R::FIRST, level = 6 * (int)(x >> at & R::M) + 4 * (int)(y >> at & R::M) - 5 * (int)R::M;
            put(R::token(run, b, j, g, t), R::coordinate(s, b, g, t), level);
          }
      }
    }
  } else if constexpr (is_trellis(F)) {
    using R = Runs<F, V ? 16 : 8, V ? C::D / 8 : C::D / 4>; u32 w[R::WORDS];
    const char* table = (const char*)(V ? P.value_pairs : P.key_pairs);
#pragma unroll
    for (int i = 0; i < R::WORDS; i++) w[i] = *(const u32*)(codes + i / R::PIECE * R::PIECE * 128 + lane * R::PIECE * 4 + i % R::PIECE * 4);
#pragma unroll
    for (int u = 0; u < R::TOKENS; u++) {
      if ((u & 3) != warp) continue;              // the same for all lanes of a warp
      const int token = V ? 8 * (4 * (u >> 3) + (u & 3)) + t + 4 * (u >> 2 & 1) : 8 * u + g, part = V ? g : t;
      u32 run[R::HELD]; open_run<R>(run, w, u, V ? lane - 4 : lane - 1, part == 0, start_of(V ? P.value : P.key, scales[(token & 7) * 8 + (token >> 3)]));
#pragma unroll
      for (int i = 0; i < R::RUN / 2; i++) {
        const u32 two = __ldg((const u16*)(table + (window<R>(run, i) & WINDOW<R>))); const int dim = part * R::RUN + 2 * i;
        put(token, dim, (int)(two & 255) - ZERO); put(token, dim + 1, (int)(two >> 8) - ZERO);
      }
    }
  } else
  for (int n = warp; n < C::D / 16; n += 4) {     // groups of 32 codes
    u32 w[B];
#pragma unroll
    for (int i = 0; i < B; i++) { const int word = n * B + i; w[i] = *(const u32*)(codes + (word >> 2) * 512 + lane * 16 + (word & 3) * 4); }
    if constexpr (F == 1) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int word = n * 2 + i, u = word >> 2, r = word & 3;
#pragma unroll
        for (int e = 0; e < 16; e++) {
          const int b = e >> 2, j = e & 3, level = 2 * (int)(w[i] >> (8 * b + 2 * j) & 3) - 3;
          if (V) put(8 * (4 * (u & 1) + b) + t + 4 * (r >> 1), (C::D / 8) * g + 2 * (4 * (u >> 1) + j) + (r & 1), level);
          else put(16 * j + g + 8 * (r & 1), 32 * u + 4 * t + b + 16 * (r >> 1), level);
        }
      }
    } else {
      u32 o[8]; decode<F>(w, o, V ? P.value : P.key);
#pragma unroll
      for (int m = 0; m < 8; m++)
#pragma unroll
        for (int b = 0; b < 4; b++) {
          const int f = m >> 2, r = m & 3, level = (int)(o[m] >> (8 * b) & 255) - ZERO;
          if (V) put(8 * (4 * f + b) + t + 4 * (r >> 1), (C::D / 8) * g + 2 * n + (r & 1), level);
          else put(16 * (n / (C::D / 64)) + g + 8 * (r & 1), 32 * (2 * (n % (C::D / 64)) + f) + 4 * t + b + 16 * (r >> 1), level);
        }
    }
  }
  __syncthreads();
  u16* out = (u16*)(V ? P.v : P.k) + blockIdx.y * P.head + ((u64)blockIdx.x * 128 + half * 64) * C::D;
  for (int e = threadIdx.x; e < 8 * C::D; e += 128) *(uint4*)(out + e * 8) = *(const uint4*)(tile + e / (C::D / 8) * C::ROW + e % (C::D / 8) * 8);
}
using Chosen = UnfoldCfg<VARIANT>;
extern "C" __global__ void __launch_bounds__(128) kvfold_unfold(const __grid_constant__ UnfoldArgs P) {
  extern __shared__ __align__(128) unsigned char sm[];
  if (blockIdx.z < 2) unfold_side<Chosen, Chosen::KF, 0>(P, sm, blockIdx.z); else unfold_side<Chosen, Chosen::VF, 1>(P, sm, blockIdx.z - 2);
}
extern "C" __device__ const int kvfold_unfold_info[1] = {Chosen::SMEM};
