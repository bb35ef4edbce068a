// Query in, result out: rotate and quantize the query of a row; merge warps, then blocks; rotate back and write.
#pragma once
#include "exact.cuh"

// One column as 16-bit integers in B fragments: hi byte in mma column 2c, lo byte in 2c + 1. Returns (largest |q|, sum of integers).
// Order: by dims, by a trellis code's runs of D/4 dims per lane, or by a computed code's of D/16 per byte of a lane, with two thirds of the column besides.
enum Order { PLAIN, RUNS, BYTES };
template <int F> constexpr Order ORDER_OF = is_computed(F) ? BYTES : is_trellis(F) ? RUNS : PLAIN;
template <class C, Order ORDER> DI float quantize(unsigned char* frag, const float (&v)[C::EPL], int column, int lane, int& sum) {
  float mx = 1e-30f; sum = 0;
#pragma unroll
  for (int i = 0; i < C::EPL; i++) mx = fmaxf(mx, fabsf(v[i]));
#pragma unroll
  for (int d = 1; d < 32; d *= 2) mx = fmaxf(mx, __shfl_xor_sync(~0u, mx, d));
  const float inv = 32600.f / mx;                 // |x| <= 32600 keeps the high byte in -127..127
#pragma unroll
  for (int i = 0; i < C::EPL; i++) {
    const int e = lane * C::EPL + i, in = e % (C::D / 4), step = in % (C::D / 16);
    const int d = ORDER == RUNS ? 32 * (in >> 3) + 16 * (in >> 2 & 1) + 4 * (e / (C::D / 4)) + (in & 3) : ORDER == BYTES ? 16 * step + 4 * (e / (C::D / 4)) + in / (C::D / 16) : e;
    const int word = d >> 4;                                          // 2 k step + row half
    const int at = (column >> 2) * C::D * 8 + (word >> 2) * 512 + ((column & 3) * 8 + (d >> 2 & 3)) * 16 + (word & 3) * 4 + (d & 3);
    auto put = [&](unsigned char* to, float y) {                      // lane 4g + t with g = 2c, 2c + 1
      const int x = __float2int_rn(y), lo = (int)(signed char)(x & 255), hi = (x - lo) >> 8; sum += x; to[at] = (unsigned char)hi; to[at + 64] = (unsigned char)lo;
    };
    put(frag, v[i] * inv); if constexpr (ORDER == BYTES) put(frag + C::Q_BYTES * (1 + C::MEAN), v[i] * inv * (2.f / 3.f));
  }
#pragma unroll
  for (int d = 1; d < 32; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
  return mx;
}
// The raw numbers of this warp's columns of a row. Volatile: they must leave before the rings fill the memory system's queues (5 us at full rate).
template <class C> struct Query {
  static constexpr int EACH = (C::COLS + C::W - 1) / C::W, N = C::EPL / 2; u32 raw[EACH][N], sign[C::EPL];         // signs of this lane's dims
  DI void load(const Args& P, const Row& row, int warp, int lane) {
    const int pad = ldg_int(&P.seq[row.b].pad); const float* signs = P.sign_k + row.head * C::D + lane * C::EPL;
#pragma unroll
    for (int i = 0; i < C::EPL; i++) asm volatile("ld.global.u32 %0,[%1];" : "=r"(sign[i]) : "l"(signs + i) : "memory");
#pragma unroll
    for (int k = 0; k < EACH; k++) {
      const unsigned char* qp = warp + k * C::W < C::COLS ? query_at<C>(P, row.b, row.head, row.tile * C::COLS + warp + k * C::W, pad) : nullptr;
#pragma unroll
      for (int i = 0; i < N; i++) { raw[k][i] = 0; if (qp) asm volatile("ld.global.u32 %0,[%1];" : "=r"(raw[k][i]) : "l"(qp + lane * C::EPL * 2 + 4 * i) : "memory"); }
    }
  }
};
// Where rows are equally long, this block's first query is known before the plan is. Elsewhere this is a wrong guess, and harmless.
template <class C> DI void touch_query(const Args& P, int warp, int lane) {
  const int rows = P.H * P.tiles, row = (int)blockIdx.x * P.B * rows / P.blocks, b = row / rows, head = (row - b * rows) / P.tiles, tile = row % P.tiles;
  if (b >= P.B || warp >= C::COLS) return;
  const unsigned char* q = query_at<C>(P, b, head, tile * C::COLS + warp, 0);
  if (q) touch(q + lane * (C::EPL * 2));
  touch(P.sign_k + head * C::D + lane * C::EPL); touch(P.sign_v + head * C::D + lane * C::EPL);
}
// All warps, one column each; column floats: score unit (log2), sum (int), mean unit / score unit. Ends with a barrier.
template <class C> DI void prepare(const Args& P, const Row& row, const Query<C>& query, unsigned char* sm, int warp, int lane) {
  float* column = (float*)(sm + C::AT_COL);
  if (threadIdx.x == 0) ((int*)column)[C::COLS * 4] = ldg_int(&P.seq[row.b].folded);
#pragma unroll
  for (int k = 0; k < Query<C>::EACH; k++) {
    const int c = warp + k * C::W; if (c >= C::COLS) break;
    float raw[C::EPL], rot[C::EPL];
#pragma unroll
    for (int i = 0; i < C::EPL; i++) {
      raw[i] = i & 1 ? high<C::H16>(query.raw[k][i / 2]) : low<C::H16>(query.raw[k][i / 2] & 0xffffu);
      rot[i] = __uint_as_float(__float_as_uint(raw[i]) ^ (query.sign[i] & 0x80000000u));
    }
    hadamard<1>(rot, lane);
#pragma unroll
    for (int i = 0; i < C::EPL; i++) rot[i] *= rsqrtf((float)C::D);
    int sum, unused; float mx = quantize<C, ORDER_OF<C::KF>>(sm + C::AT_Q, rot, c, lane, sum), mr = mx;
    if constexpr (C::MEAN) mr = quantize<C, PLAIN>(sm + C::AT_Q + C::Q_BYTES, raw, c, lane, unused);
    const float u = unit_of(C::KF);
    if (lane == 0) { column[c * 4] = mx / 32600.f * 1.4426950408889634f * P.scale * u; ((int*)column)[c * 4 + 1] = sum; column[c * 4 + 2] = mr / (mx * u); }
  }
  __syncthreads();
}
// o [COLS][STRIDE] unnormalised and rotated, sums [COLS] -> out. All warps.
template <class C> DI void finish(const Args& P, const Row& row, const float* o, const float* sums, int warp, int lane) {
  for (int c = warp; c < C::COLS; c += C::W) {
    int col = row.tile * C::COLS + c, i = col / P.G; if (col >= P.G * P.Q) continue;
    float v[C::EPL], L = sums[c], f = L > 0 && i >= ldg_int(&P.seq[row.b].pad) ? rsqrtf((float)C::D) / L : 0.f;
#pragma unroll
    for (int k = 0; k < C::EPL; k++) v[k] = o[c * C::STRIDE + lane * C::EPL + k];
    hadamard<1>(v, lane);
    const float* sign = P.sign_v + row.head * C::D + lane * C::EPL;
    u32* out = (u32*)((u16*)P.out + row.b * P.o_b + (row.head * P.G + col % P.G) * P.o_h + i * P.o_i + lane * C::EPL);
#pragma unroll
    for (int k = 0; k < C::EPL / 2; k++) out[k] = f > 0 ? pair<C::H16>(v[2 * k] * f * sign[2 * k], v[2 * k + 1] * f * sign[2 * k + 1]) : 0u;
  }
}
// The last block of a row adds up the parts in block order, a thread per number. Numbers, maxima and sums of the first parts are asked for at
// once: one round trip to memory.
template <class C> DI void merge_blocks(const Args& P, const Row& row, const Cut cut, unsigned char* sm, int warp, int lane) {
  constexpr int PARTS = 16, EACH = (C::COLS * C::D + C::THREADS - 1) / C::THREADS, MINE = (C::COLS + C::W - 1) / C::W;       // parts at a time; numbers; columns
  float *buf = (float*)(sm + C::AT_BUF), *weight = (float*)(sm + C::AT_ML), *sums = weight + 2 * C::W * C::COLS;             // weight [COLS][PARTS]
  const int c0 = cut.block(row.first), parts = cut.block(row.first + row.items - 1) - c0 + 1;
  const float* base = P.partial + (u64)c0 * 2 * C::PARTIAL;
  const bool shared = cut.begin(c0) < row.first;                      // the first part is its block's second share, the others their block's first
  auto part = [&](int p) { return base + (u64)p * 2 * C::PARTIAL + (shared && p == 0 ? C::PARTIAL : 0); };
  float x[PARTS], sum[EACH] = {}, M[MINE], m[MINE];
  auto load = [&](int p0, int e) {
#pragma unroll
    for (int j = 0; j < PARTS; j++) x[j] = p0 + j < parts && e < C::COLS * C::D ? __ldcg(part(p0 + j) + e) : 0.f;
  };
  load(0, threadIdx.x);
#pragma unroll
  for (int k = 0; k < MINE; k++) {
    const int c = warp + k * C::W; if (c >= C::COLS) break;
    float L = 0, top = -3e38f; m[k] = -3e38f;
    for (int p = lane; p < parts; p += 32) {
      const float *w = part(p) + C::COLS * C::D + c, mp = __ldcg(w), lp = __ldcg(w + C::COLS), mn = fmaxf(top, mp);
      L = fmaf(L, ex2(top - mn), lp * ex2(mp - mn)); top = mn; if (p < 32) m[k] = mp;
    }
    M[k] = top;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) M[k] = fmaxf(M[k], __shfl_xor_sync(~0u, M[k], d));
    L *= ex2(top - M[k]);
#pragma unroll
    for (int d = 1; d < 32; d *= 2) L += __shfl_xor_sync(~0u, L, d);
    if (lane == 0) sums[c] = L;
  }
#pragma unroll 1
  for (int p0 = 0; p0 < parts; p0 += PARTS) {
#pragma unroll
    for (int k = 0; k < MINE; k++) {
      const int c = warp + k * C::W; if (c >= C::COLS) break;
      if (p0 > 0) m[k] = p0 + lane < parts ? __ldcg(part(p0 + lane) + C::COLS * C::D + c) : -3e38f;
      if (lane < PARTS) weight[c * PARTS + lane] = ex2(m[k] - M[k]);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int e = threadIdx.x + i * C::THREADS; if (i > 0 || p0 > 0) load(p0, e);
#pragma unroll
      for (int j = 0; j < PARTS; j++) if (e < C::COLS * C::D) sum[i] = fmaf(weight[e / C::D * PARTS + j], x[j], sum[i]);
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < EACH; i++) { const int e = threadIdx.x + i * C::THREADS; if (e < C::COLS * C::D) buf[e / C::D * C::STRIDE + e % C::D] = sum[i]; }
  __syncthreads();
}
// All warps: end of the block's share of a row. `second`: it is not the block's first. Ends with a barrier.
template <class C> DI void merge(State<C>& s, const Plan& plan, int from, int to, int second, bool last, unsigned char* sm, int warp, int lane) {
  const int g = lane >> 2, t = lane & 3; const Args& P = plan.P; const Row row = plan.locate(from); const float zero = zero_of(C::VF), unit = unit_of(C::VF);
  float *ml = (float*)(sm + C::AT_ML), *buf = (float*)(sm + C::AT_BUF), *sums = ml + 2 * C::W * C::COLS; int* flag = (int*)(sums + C::COLS);
#pragma unroll
  for (int n = 0; n < C::NG; n++) {
#pragma unroll
    for (int d = 4; d < 32; d *= 2) { s.l[n] += __shfl_xor_sync(~0u, s.l[n], d); s.zs[n] += __shfl_xor_sync(~0u, s.zs[n], d); }
    if (g == 0) { ml[warp * C::COLS + 4 * n + t] = s.m[n]; ml[(C::W + warp) * C::COLS + 4 * n + t] = s.l[n]; }
  }
  __syncthreads();
  float* part = P.partial + ((u64)blockIdx.x * 2 + second) * C::PARTIAL;
  const bool whole = from == row.first && to == row.first + row.items;
#pragma unroll
  for (int n = 0; n < C::NG; n++) {               // lane 4g + t looks at warps g, g + 8 of column t
    float M = -3e38f, L = 0; const float* at = ml + 4 * n + t;
#pragma unroll
    for (int k = 0; k < C::W; k += 8) M = fmaxf(M, at[(k + g) * C::COLS]);
#pragma unroll
    for (int d = 4; d < 32; d *= 2) M = fmaxf(M, __shfl_xor_sync(~0u, M, d));
#pragma unroll
    for (int k = 0; k < C::W; k += 8) L = fmaf(ex2(at[(k + g) * C::COLS] - M), at[(C::W + k + g) * C::COLS], L);
#pragma unroll
    for (int d = 4; d < 32; d *= 2) L += __shfl_xor_sync(~0u, L, d);
    if (warp == 0 && g == 0) { sums[4 * n + t] = L; if (!whole) { __stcg(part + C::COLS * C::D + 4 * n + t, M); __stcg(part + C::COLS * (C::D + 1) + 4 * n + t, L); } }
    const float f = ex2(s.m[n] - M) * unit;
#pragma unroll
    for (int i = 0; i < 2 * C::MT; i++) s.O[n][i] = (s.O[n][i] - zero * s.zs[n]) * f;
  }
  // At the end of a block's work its rings are free: every warp writes into its own. Before, they are in flight: a small buffer, in rounds.
  constexpr int EACH = (C::COLS * C::D + C::THREADS - 1) / C::THREADS, RING = C::R * C::SLOT / 4;
  const bool roomy = last && RING >= C::COLS * C::STRIDE; const int round = roomy ? C::W : C::ROUND, step = roomy ? RING : C::COLS * C::STRIDE;
  float sum[EACH] = {}; float* store = roomy ? (float*)sm : buf;
#pragma unroll 1
  for (int r0 = 0; r0 < C::W; r0 += round) {
    if (warp >= r0 && warp < r0 + round)
#pragma unroll
      for (int n = 0; n < C::NG; n++)
#pragma unroll
        for (int i = 0; i < C::MT / 2; i++)
          *(float4*)(store + (warp - r0) * step + (4 * n + t) * C::STRIDE + g * (C::D / 8) + 4 * i) = make_float4(s.O[n][4 * i], s.O[n][4 * i + 1], s.O[n][4 * i + 2], s.O[n][4 * i + 3]);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      int e = threadIdx.x + i * C::THREADS; const float* at = store + e / C::D * C::STRIDE + e % C::D;
      if (e < C::COLS * C::D)
#pragma unroll 4
        for (int k = 0; k < round; k++) sum[i] += at[k * step];
    }
    if (r0 + round < C::W) __syncthreads();
  }
  if (whole && !roomy) __syncthreads();           // buf is still being read
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    int e = threadIdx.x + i * C::THREADS;
    if (e < C::COLS * C::D) { if (whole) buf[e / C::D * C::STRIDE + e % C::D] = sum[i]; else __stcg(part + e, sum[i]); }
  }
  __syncthreads();
  if (!whole) {
    if (threadIdx.x == 0) {
      const Cut cut = plan.cut(); const int parts = cut.block(row.first + row.items - 1) - cut.block(row.first) + 1;
      __threadfence();                            // the barrier put all of the block's stores before this fence
      int done = atomicAdd(P.count + row.row, 1) == parts - 1; if (done) P.count[row.row] = 0; *flag = done; __threadfence();
    }
    __syncthreads();
    if (!*flag) return;
    merge_blocks<C>(P, row, plan.cut(), sm, warp, lane);
  }
  finish<C>(P, row, buf, sums, warp, lane);
}
