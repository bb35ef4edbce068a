// Attention of a few new queries over folded pages and the exact part, decode and speculative decode.
//   out = softmax(scale q [K_pages | K_exact]^T) [V_pages | V_exact],  K_page = R^T(s L) + mean, V_page = R^T(s L); R = Hadamard signs / sqrt(D)
// Layout: pages in fragment order (formats.cuh), addresses per sequence in the Sequence table; q, out [B, H G, Q, D]; new k, v [B, H, Q, D].
// Grid: one block per SM; items of all rows cut into equal parts (ring.cuh). Columns of a row: query i of head h G + j is column i G + j.
// Limits: D 64, 128, 256; 16-bit models; up to MAX_BATCH sequences; more than 4 NG columns are walked in tiles.
// Bound: HBM at 4 and 3 bits and uniform 2 bits; integer pipe at free 2-bit levels and trellis codes.
#include "merge.cuh"

template <class C> DI void page_loads_only(Ring<C>& ring, u32& junk, int lane) {
  for (int half = 0; half < 4; half++) {
    u32 base = ring.wait(); constexpr int N = (C::Reg::K_CODES < C::Reg::V_CODES ? C::Reg::K_CODES : C::Reg::V_CODES) / 512;
#pragma unroll
    for (int i = 0; i < N; i++) { uint4 v = lds4(base + i * 512 + lane * 16); junk ^= v.x ^ v.y ^ v.z ^ v.w; }
    ring.release();
  }
}
template <class C> DI void page(State<C>& s, Ring<C>& ring, const Plan& plan, int number, const unsigned char* sm, u32 tables, int lane) {
  const float* column = (const float*)(sm + C::AT_COL);
  const int hidden = number == 0 ? plan.P.sinks : 0, shown = ((const int*)column)[C::COLS * 4] - number * 128;
#pragma unroll 1
  for (int half = 0; half < 2; half++) chunk<C>(s, ring, plan, shared_address(sm) + C::AT_Q, column, hidden - 64 * half, shown - 64 * half, tables, lane);
}
template <class C> DI void attend(const Args& P) {
  extern __shared__ __align__(128) unsigned char sm[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5; u32 junk = 0;
  const u32 tables = shared_address(sm) + C::AT_TABLES;
  copy_table<C::KF>(sm + C::AT_TABLES, P.key_pairs); copy_table<C::VF>(sm + C::AT_TABLES + C::K_TABLE, P.value_pairs);
  dependent_wait();
  if (threadIdx.x == 0) *(Args*)(sm + C::AT_ARGS) = P;                // for exact_item
  Plan plan{(int*)(sm + C::AT_PLAN), (int*)(sm + C::AT_PLAN) + MAX_BATCH + 2, P};
  make_plan<C>(P, plan);
  if ((int)blockIdx.x >= plan.blocks()) return;
  const int begin = plan.cut().begin(blockIdx.x), end = plan.cut().begin(blockIdx.x + 1);
  // The first query is asked for before the rings fill the queues of the memory system.
  Query<C> query; query.load(P, plan.locate(begin), warp, lane);
  Ring<C> ring; ring.init(sm, warp, begin, end); ring.start(plan);
  State<C> s;
#pragma unroll 1
  for (int at = begin; at < end;) {
    const Row row = plan.locate(at); const int stop = row.first + row.items < end ? row.first + row.items : end, first = row.first, pages = row.first + row.items - row.exact;
    prepare<C>(P, row, query, sm, warp, lane);
    const float* column = (const float*)(sm + C::AT_COL);
    s.reset();
#pragma unroll
    for (int n = 0; n < C::NG; n++) { s.cs[n] = column[(4 * n + (lane & 3)) * 4]; s.zq[n] = ((const int*)column)[(4 * n + (lane & 3)) * 4 + 1]; }
    int i = at + (warp + C::W - (at - begin) % C::W) % C::W;
#pragma unroll 1
    for (; i < stop && i < pages; i += C::W) {
      ring.refill(plan);
      if constexpr (C::MODE == 1) page_loads_only<C>(ring, junk, lane); else page<C>(s, ring, plan, i - first, sm, tables, lane);
    }
#pragma unroll 1
    for (; i < stop; i += C::W)
      if constexpr (C::MODE != 1 && C::MODE != 3) { State<C> in_memory = s; exact_item<C>(in_memory, sm, i, lane); s = in_memory; }
    if (stop == end) dependent_launch();
    if constexpr (C::MODE != 1) merge<C>(s, plan, at, stop, at != begin, stop == end, sm, warp, lane);
    __syncthreads();
    at = stop;
    if (at < end) query.load(P, plan.locate(at), warp, lane);
  }
  if (C::MODE == 1 && junk == 0x12345678u) *(u32*)P.out = 1;
}
#ifndef VARIANT   // D, key format, value format, mean, column groups, warps, ring slots, bulk copies, float16, mode
#define VARIANT 128, 4, 4, 1, 1, 16, 3, 1, 0, 0
#endif
using Chosen = Cfg<VARIANT>;
extern "C" __global__ void __launch_bounds__(Chosen::THREADS, 1) kvfold_decode(const __grid_constant__ Args P) { attend<Chosen>(P); }
extern "C" __device__ const int kvfold_decode_info[4] = {Chosen::SMEM, Chosen::PARTIAL, Chosen::COLS, Chosen::THREADS};
