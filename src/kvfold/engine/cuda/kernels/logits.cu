// Scores of a few queries over folded pages and nothing else, for callers with a softmax of their own.
//   out = scale q K_pages^T,  K_page = R^T(s L) + mean; float32; sinks and tokens that are not there get -infinity
// Layout: pages and sequences as decode.cu reads them, keys alone are loaded; out [B, H G, Q, 128 pages], token t of the pages at t.
// Grid: one block per SM; pages of all rows cut into equal parts (ring.cuh). Limits: those of decode.cu.
// Bound: HBM. A key of 128 numbers at 4 bits is 68 bytes, means included; the scores of 4 queries are 16 more.
#include "merge.cuh"

template <class C> DI void store_scores(const Args& P, const Row& row, const float (&x)[C::NG][8], const State<C>& s, long long token, int hidden, int shown, int lane) {
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int n = 0; n < C::NG; n++) {
    const int column = row.tile * C::COLS + 4 * n + t; if (column >= P.G * P.Q) continue;
    float* out = (float*)P.out + row.b * P.o_b + (row.head * P.G + column % P.G) * P.o_h + column / P.G * P.o_i + token;
    const float unit = s.cs[n] * 0.6931471805599453f;                 // of log2
#pragma unroll
    for (int i = 0; i < 8; i++) { const int e = 8 * i + g; out[e] = e < hidden || e >= shown ? __int_as_float(0xff800000) : x[n][i] * unit; }
  }
}
template <class C> DI void logits(const Args& P) {
  extern __shared__ __align__(128) unsigned char sm[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const u32 tables = shared_address(sm) + C::AT_TABLES; const float* column = (const float*)(sm + C::AT_COL);
  copy_table<C::KF>(sm + C::AT_TABLES, P.key_pairs);
  dependent_wait();
  Plan plan(sm + C::AT_PLAN, P);
  make_plan<C>(P, plan);
  if ((int)blockIdx.x >= plan.blocks()) return;
  const Cut cut = plan.cut(); const int begin = cut.begin(blockIdx.x), end = begin + cut.size(blockIdx.x);
  Query<C> query; query.load(P, plan.locate(begin), warp, lane);
  Ring<C> ring; ring.init(sm, warp, begin); ring.start(plan, end);
  State<C> s; int i = begin + warp;                                   // this warp's next item
#pragma unroll 1
  for (int at = begin; at < end;) {
    const Row row = plan.locate(at); const int stop = row.first + row.items < end ? row.first + row.items : end;
    prepare<C>(P, row, query, sm, warp, lane);
#pragma unroll
    for (int n = 0; n < C::NG; n++) { s.cs[n] = column[(4 * n + (lane & 3)) * 4]; s.zq[n] = ((const int*)column)[(4 * n + (lane & 3)) * 4 + 1]; }
    const int folded = ((const int*)column)[C::COLS * 4];
#pragma unroll 1
    for (; i < stop; i += C::W) {
      ring.refill(plan, end);
      const int first = CHUNK * (i - row.first); float x[C::NG][8];
      chunk_scores<C>(x, s, ring, P.key, shared_address(sm) + C::AT_Q, column, tables, lane);
      store_scores<C>(P, row, x, s, first, P.sinks - first, folded - first, lane);
    }
    if (stop == end) dependent_launch();
    __syncthreads();                              // the next row's query takes this one's place
    at = stop;
    if (at < end) query.load(P, plan.locate(at), warp, lane);
  }
}
#ifndef VARIANT   // as of decode.cu
#define VARIANT 128, 4, 4, 1, 1, 16, 3, 1, 0, 4
#endif
using Chosen = Cfg<VARIANT>;
extern "C" __global__ void __launch_bounds__(Chosen::THREADS, 1) kvfold_logits(const __grid_constant__ Args P) { logits<Chosen>(P); }
extern "C" __device__ const int kvfold_logits_info[4] = {Chosen::SMEM, Chosen::PARTIAL, Chosen::COLS, Chosen::THREADS};
