// Words of PTX that the kernels are made of. No header is included, so run-time compilation needs no include path.
#pragma once
#define DI __device__ __forceinline__
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

DI u32 prmt(u32 a, u32 b, u32 s) { u32 d; asm("prmt.b32 %0,%1,%2,%3;" : "=r"(d) : "r"(a), "r"(b), "r"(s)); return d; }
DI u32 mad(u32 a, u32 b, u32 c) { u32 d; asm("mad.lo.u32 %0,%1,%2,%3;" : "=r"(d) : "r"(a), "r"(b), "r"(c)); return d; }
DI float ex2(float x) { float y; asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x)); return y; }
DI float rcp(float x) { float y; asm("rcp.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x)); return y; }

// ---- float16 (H = 1) and bfloat16 (H = 0) without their headers
DI float half_float(u32 x) { float y; asm("{.reg .b16 h; cvt.u16.u32 h,%1; cvt.f32.f16 %0,h;}" : "=f"(y) : "r"(x)); return y; }
DI float half_low(u32 x) { return half_float(x & 0xffffu); }
DI float half_high(u32 x) { return half_float(x >> 16); }
DI u32 float_half(float x) { u32 y; asm("{.reg .b16 h; cvt.rn.f16.f32 h,%1; cvt.u32.u16 %0,h;}" : "=r"(y) : "f"(x)); return y; }
template <int H> DI float low(u32 x) { if constexpr (H) return half_low(x); else return __uint_as_float(x << 16); }
template <int H> DI float high(u32 x) { if constexpr (H) return half_high(x); else return __uint_as_float(x & 0xffff0000u); }
template <int H> DI u32 pair(float lo, float hi) {
  u32 y;
  if constexpr (H) asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(y) : "f"(hi), "f"(lo));
  else asm("cvt.rn.bf16x2.f32 %0,%1,%2;" : "=r"(y) : "f"(hi), "f"(lo));
  return y;
}
DI u32 half_max2(u32 a, u32 b) { u32 d; asm("max.f16x2 %0,%1,%2;" : "=r"(d) : "r"(a), "r"(b)); return d; }

// ---- tensor cores: D += A B with 16 x 32 bytes times 32 x 8 bytes, or 16 x 16 halves times 16 x 8
#define MMA_I8(NAME, TA, TB) \
  DI void NAME(int (&c)[4], const u32* a, u32 b0, u32 b1) { \
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32." TA "." TB ".s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};" \
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)); }
MMA_I8(mma_us, "u8", "s8")
MMA_I8(mma_uu, "u8", "u8")
MMA_I8(mma_ss, "s8", "s8")
template <int H> DI void mma_f(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  if constexpr (H)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// ---- shared memory, global memory
DI u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DI uint4 lds4(u32 a) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(a) : "memory");
  return v;
}
DI uint2 lds2(u32 a) { uint2 v; asm volatile("ld.shared.v2.u32 {%0,%1},[%2];" : "=r"(v.x), "=r"(v.y) : "r"(a) : "memory"); return v; }
DI u32 lds_u16(u32 a) { u16 v; asm volatile("ld.shared.u16 %0,[%1];" : "=h"(v) : "r"(a) : "memory"); return v; }
// Nothing a kernel reads from global memory is written while it runs (partial results go through __ldcg), so the compiler may move these.
DI uint4 ldg4(const void* p) { return __ldg((const uint4*)p); }
DI u64 ldg_u64(const void* p) { return __ldg((const u64*)p); }
// Into the first-level cache, for a read soon after: one round trip instead of two, one after the other.
DI void touch(const void* p) { u32 x; asm volatile("ld.global.nc.u32 %0,[%1];" : "=r"(x) : "l"(p)); }
DI int ldg_int(const void* p) { return __ldg((const int*)p); }

// ---- bulk copies (sm_90+) and plain asynchronous copies (sm_80+)
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
DI void barrier_init(u32 b) { asm volatile("mbarrier.init.shared::cta.b64 [%0],1;" ::"r"(b) : "memory"); }
DI void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
DI void barrier_wait(u32 b, u32 phase) {
  u32 ok;
  do asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p,[%1],%2; selp.u32 %0,1,0,p;}" : "=r"(ok) : "r"(b), "r"(phase) : "memory");
  while (!ok);
}
DI void bulk_copy(u32 dst, u64 src, u32 bytes, u32 b) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _,[%0],%1;" ::"r"(b), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];" ::"r"(dst), "l"(src), "r"(bytes), "r"(b) : "memory");
}
DI void dependent_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DI void dependent_launch() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
#else
DI void barrier_init(u32) {}
DI void barrier_init_fence() {}
DI void barrier_wait(u32, u32) {}
DI void bulk_copy(u32, u64, u32, u32) {}
DI void dependent_wait() {}
DI void dependent_launch() {}
#endif
DI void async_copy16(u32 dst, u64 src) { asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(dst), "l"(src) : "memory"); }
DI void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DI void async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
