// A warp of the CUDA kernels on the host: 32 threads that meet at every exchange, and what kernels/ptx.cuh has of words, in plain C++.
// Copies into shared memory do nothing: a test puts there what it wants read.
#pragma once
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <type_traits>
#include <vector>

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
#define DI inline
#define __device__
#define __host__
#define __noinline__ inline
#define __align__(x)
#define __shared__

struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
struct float4 { float x, y, z, w; };
inline uint4 make_uint4(u32 a, u32 b, u32 c, u32 d) { return {a, b, c, d}; }
inline float4 make_float4(float a, float b, float c, float d) { return {a, b, c, d}; }
struct Place { unsigned x, y, z; };
inline thread_local Place threadIdx;
inline Place blockIdx, blockDim{32, 1, 1}, gridDim{1, 1, 1};
inline std::vector<unsigned char> shared_memory;

// ---- exchanges
inline std::barrier<> meet(32);
inline u32 board[32][6];
template <class T> T exchanged(T x, int from) {
  static_assert(sizeof(T) <= 8);
  std::memcpy(board[threadIdx.x], &x, sizeof x);
  meet.arrive_and_wait();
  std::memcpy(&x, board[from & 31], sizeof x);
  meet.arrive_and_wait();
  return x;
}
template <class T> T __shfl_sync(u32, T x, int from) { return exchanged(x, from); }
template <class T> T __shfl_xor_sync(u32, T x, int d) { return exchanged(x, static_cast<int>(threadIdx.x) ^ d); }
template <class T> T __shfl_up_sync(u32, T x, int d) { const int lane = threadIdx.x; return exchanged(x, lane < d ? lane : lane - d); }
inline u32 __ballot_sync(u32, u32 said) {
  board[threadIdx.x][0] = said;
  meet.arrive_and_wait();
  u32 out = 0;
  for (int i = 0; i < 32; i++) out |= static_cast<u32>(board[i][0] != 0) << i;
  meet.arrive_and_wait();
  return out;
}
inline bool __any_sync(u32 m, bool said) { return __ballot_sync(m, said) != 0; }
inline bool __all_sync(u32 m, bool said) { return __ballot_sync(m, said) == ~0u; }
inline void __syncwarp() {}
inline void __syncthreads() { meet.arrive_and_wait(); }
inline void __threadfence() {}
inline int atomicAdd(int* at, int x) { const int old = *at; *at += x; return old; }

// mma.m16n8k32: lane 4g + t has rows g and g + 8 of A at bytes 4t and 16 + 4t, column g of B at the same, columns 2t and 2t + 1 of the rows of C.
template <class A, class B> void product(int (&c)[4], const u32* a, u32 b0, u32 b1) {
  const int lane = threadIdx.x, g = lane >> 2, t = lane & 3;
  std::memcpy(board[lane], a, 16);
  board[lane][4] = b0, board[lane][5] = b1;
  meet.arrive_and_wait();
  for (int i = 0; i < 4; i++)
    for (int k = 0; k < 32; k++) {
      const int half = k >> 4, lane_of = k >> 2 & 3, shift = 8 * (k & 3);
      const A x = static_cast<A>(board[4 * g + lane_of][(i >> 1) + 2 * half] >> shift);
      const B y = static_cast<B>(board[4 * (2 * t + (i & 1)) + lane_of][4 + half] >> shift);
      c[i] = static_cast<int>(static_cast<u32>(c[i]) + static_cast<u32>(x * y));
    }
  meet.arrive_and_wait();
}
inline void mma_us(int (&c)[4], const u32* a, u32 b0, u32 b1) { product<u8, signed char>(c, a, b0, b1); }
inline void mma_uu(int (&c)[4], const u32* a, u32 b0, u32 b1) { product<u8, u8>(c, a, b0, b1); }
inline void mma_ss(int (&c)[4], const u32* a, u32 b0, u32 b1) { product<signed char, signed char>(c, a, b0, b1); }
template <int H> void mma_f(float (&)[4], u32, u32, u32, u32, u32, u32);  // of exact tokens, which no test here has

// ---- words
inline u32 mad(u32 a, u32 b, u32 c) { return a * b + c; }
inline u32 prmt(u32 a, u32 b, u32 selector) {
  u32 out = 0;
  for (int i = 0; i < 4; i++) {
    const u32 s = selector >> 4 * i & 15, byte = (s & 4 ? b : a) >> 8 * (s & 3) & 255;
    out |= (s & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
  }
  return out;
}
template <class To, class From> To same_bits(From x) { To y; static_assert(sizeof x == sizeof y); std::memcpy(&y, &x, sizeof x); return y; }
inline u32 __float_as_uint(float x) { return same_bits<u32>(x); }
inline float __uint_as_float(u32 x) { return same_bits<float>(x); }
inline float __int_as_float(int x) { return same_bits<float>(x); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline u32 __funnelshift_l(u32 low, u32 high, u32 s) { return s ? high << s | low >> (32 - s) : high; }
inline u32 __funnelshift_r(u32 low, u32 high, u32 s) { return s ? low >> s | high << (32 - s) : low; }
inline int __ffs(u32 x) { return __builtin_ffs(static_cast<int>(x)); }
inline float ex2(float x) { return std::exp2(x); }
inline float rcp(float x) { return 1 / x; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float half_float(u32 x) { return static_cast<float>(same_bits<_Float16>(static_cast<u16>(x))); }
inline float half_low(u32 x) { return half_float(x & 0xffff); }
inline float half_high(u32 x) { return half_float(x >> 16); }
inline u32 half_max2(u32 a, u32 b) {
  const u32 low = half_low(a) > half_low(b) ? a : b, high = half_high(a) > half_high(b) ? a : b;
  return (low & 0xffffu) | (high & 0xffff0000u);
}
template <int H> float low(u32 x) { return H ? half_low(x) : __uint_as_float(x << 16); }
template <int H> float high(u32 x) { return H ? half_high(x) : __uint_as_float(x & 0xffff0000u); }
template <int H> u32 pair(float, float);

// ---- memory
inline u32 shared_address(const void* p) { return static_cast<u32>(static_cast<const unsigned char*>(p) - shared_memory.data()); }
template <class T> T held(u32 at) { T x; std::memcpy(&x, shared_memory.data() + at, sizeof x); return x; }
inline uint4 lds4(u32 at) { return held<uint4>(at); }
inline uint2 lds2(u32 at) { return held<uint2>(at); }
inline u32 lds_u16(u32 at) { return held<u16>(at); }
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> void __stcg(T* p, T x) { *p = x; }
inline int ldg_int(const void* p) { return *static_cast<const int*>(p); }
inline u64 ldg_u64(const void* p) { return *static_cast<const u64*>(p); }
inline uint4 ldg4(const void* p) { return *static_cast<const uint4*>(p); }
inline void touch(const void*) {}
inline void barrier_init(u32) {}
inline void barrier_init_fence() {}
inline void barrier_wait(u32, u32) {}
inline void bulk_copy(u32, u64, u32, u32) {}
inline void dependent_wait() {}
inline void dependent_launch() {}
inline void async_copy16(u32, u64) {}
inline void async_commit() {}
template <int N> void async_wait() {}
