// 32 exact tokens (sinks, ring, new tokens) of one KV head: 16-bit tensor cores straight from global memory. The query's own 16 bits stand in
// the even columns; weights are split in two halves (17+ bits) over both. The output is rotated here, so that it joins the packed pages' sum.
#pragma once
#include "chunk.cuh"
#include "hadamard.cuh"

template <class C> struct Exact {                 // addresses of a row's exact tokens, in the order sinks, ring, new
  const Args& P; int head, pad, sinks, old, count, first, ring; const unsigned char *sink[2], *recent[2], *fresh[2]; long long step[2];
  DI Exact(const Args& P_, int b, int head_) : P(P_), head(head_) {
    const Sequence& s = P.seq[b]; const int folded = ldg_int(&s.folded); pad = ldg_int(&s.pad);
    sinks = folded > 0 ? P.sinks : 0; old = sinks + ldg_int(&s.length) - folded; count = old + P.Q - pad;
    first = ldg_int(&s.first) - sinks; ring = ldg_int(&s.ring);
    const u64 recent_at = 2ull * head * ldg_u64(&s.stride), sink_at = (u64)head * P.sinks * (C::D * 2);
    sink[0] = (const unsigned char*)ldg_u64(&s.sink_k) + sink_at; sink[1] = (const unsigned char*)ldg_u64(&s.sink_v) + sink_at;
    recent[0] = (const unsigned char*)ldg_u64(&s.recent_k) + recent_at; recent[1] = (const unsigned char*)ldg_u64(&s.recent_v) + recent_at;
    fresh[0] = (const unsigned char*)P.k + 2 * (b * P.k_b + head * P.k_h); fresh[1] = (const unsigned char*)P.v + 2 * (b * P.v_b + head * P.v_h);
    step[0] = 2 * P.k_i; step[1] = 2 * P.v_i;
  }
  DI const unsigned char* at(int e, int side) const {
    e = e < count ? e : count > 0 ? count - 1 : 0;
    if (e < sinks) return sink[side] + e * (C::D * 2);
    if (e < old) { int slot = first + e; return recent[side] + (slot < ring ? slot : slot - ring) * (C::D * 2); }
    int i = e - old + pad < P.Q ? e - old + pad : P.Q - 1;
    return fresh[side] + i * step[side];
  }
};
template <class C> DI const unsigned char* query_at(const Args& P, int b, int head, int column, int pad) {          // 0 for a column that is not there
  int i = column / P.G;
  return column < P.G * P.Q && i >= pad ? (const unsigned char*)P.q + 2 * (b * P.q_b + (head * P.G + column % P.G) * P.q_h + i * P.q_i) : nullptr;
}
// Not inlined: its registers must not press on the page loop. Few round trips to memory, each with everything in flight: arguments come from
// shared memory; keys, query and signs are loaded at once, values while the softmax is computed.
DI uint4 load4(const void* p) {
  uint4 v; asm volatile("ld.global.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p)); return v;
}
template <class C> __device__ __noinline__ void exact_item(State<C>& s, const unsigned char* sm, int item, int lane) {
  const Args& P = *(const Args*)(sm + C::AT_ARGS); const Plan plan(const_cast<unsigned char*>(sm) + C::AT_PLAN, P);
  const Row row = plan.locate(item); const Exact<C> E(P, row.b, row.head);
  const int g = lane >> 2, t = lane & 3, e0 = (item - row.first - row.middle) * EXACT_ITEM;
  // One address per lane, passed round: code that runs once costs mostly its own fetching.
  const u64 key_row = (u64)E.at(e0 + lane, 0), value_row = (u64)E.at(e0 + lane, 1);
  uint4 key[2][2][C::KT], query[C::NG][C::KT];
#pragma unroll
  for (int tile = 0; tile < 2; tile++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const unsigned char* k = (const unsigned char*)__shfl_sync(~0u, key_row, 16 * tile + 8 * r + g) + 16 * t;
#pragma unroll
      for (int i = 0; i < C::KT; i++) key[tile][r][i] = load4(k + 64 * i);
    }
#pragma unroll
  for (int n = 0; n < C::NG; n++) {
    const unsigned char* q = g & 1 ? nullptr : query_at<C>(P, row.b, row.head, row.tile * C::COLS + 4 * n + (g >> 1), E.pad);
#pragma unroll
    for (int i = 0; i < C::KT; i++) { query[n][i] = make_uint4(0, 0, 0, 0); if (q) query[n][i] = load4(q + 64 * i + 16 * t); }
  }
  {
#pragma unroll 1
    for (int at = 0; at < C::D * 2; at += 128) asm volatile("prefetch.global.L2 [%0];" ::"l"(value_row + at));
    asm volatile("prefetch.global.L2 [%0];" ::"l"(P.sign_v + row.head * C::D + lane * (C::D / 32)));
  }
  float x[C::NG][4];
#pragma unroll
  for (int tile = 0; tile < 2; tile++)
#pragma unroll
    for (int n = 0; n < C::NG; n++) {
      float c[4] = {};
#pragma unroll
      for (int i = 0; i < C::KT; i++) {
        const uint4 a = key[tile][0][i], b = key[tile][1][i], q = query[n][i];
        mma_f<C::H16>(c, a.x, b.x, a.y, b.y, q.x, q.y); mma_f<C::H16>(c, a.z, b.z, a.w, b.w, q.z, q.w);
      }
      const int asked = (row.tile * C::COLS + 4 * n + t) / P.G;
#pragma unroll
      for (int r = 0; r < 2; r++) {
        int e = e0 + 16 * tile + 8 * r + g;
        x[n][2 * tile + r] = e < E.count && E.pad + e - E.old <= asked ? c[2 * r] * (P.scale * 1.4426950408889634f) : MASKED;
      }
    }
  uint4 value[2][4];                              // the first 16-byte piece of both tiles
  const unsigned char* vp[2][4];
#pragma unroll
  for (int tile = 0; tile < 2; tile++)
#pragma unroll
    for (int i = 0; i < 4; i++) { vp[tile][i] = (const unsigned char*)__shfl_sync(~0u, value_row, 16 * tile + 2 * t + (i & 1) + 8 * (i >> 1)) + g * (C::D / 4); value[tile][i] = load4(vp[tile][i]); }
  u32 pw[C::NG][4]; float fac[C::NG];
#pragma unroll
  for (int n = 0; n < C::NG; n++) {
    float mx = fmaxf(fmaxf(x[n][0], x[n][1]), fmaxf(x[n][2], x[n][3])), lc = 0;
#pragma unroll
    for (int d = 4; d < 32; d *= 2) mx = fmaxf(mx, __shfl_xor_sync(~0u, mx, d));
    s.raise(n, mx); fac[n] = ex2(mx - s.m[n]);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float p = x[n][i] == MASKED ? 0.f : ex2(x[n][i] - mx); lc += p;
      float hi = low<C::H16>(pair<C::H16>(p, 0.f)); pw[n][i] = pair<C::H16>(p, p - hi);
    }
    s.l[n] = fmaf(lc, fac[n], s.l[n]);
  }
#pragma unroll
  for (int n = 0; n < C::NG; n++) {               // one group of columns at a time: V comes from cache the second time
    float o[C::MT][4] = {};
#pragma unroll
    for (int tile = 0; tile < 2; tile++) {
      const u32 w0 = pw[n][2 * tile], w1 = pw[n][2 * tile + 1], sel = g & 1 ? 0x7632u : 0x5410u; const int from = 8 * t + (g >> 1);
      const u32 b0 = prmt(__shfl_sync(~0u, w0, from), __shfl_sync(~0u, w0, from + 4), sel), b1 = prmt(__shfl_sync(~0u, w1, from), __shfl_sync(~0u, w1, from + 4), sel);
#pragma unroll
      for (int j = 0; j < C::D / 64; j++) {
        uint4 v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] = j == 0 ? value[tile][i] : load4(vp[tile][i] + 16 * j);
#pragma unroll
        for (int k = 0; k < 4; k++) {
          u32 y[4];
#pragma unroll
          for (int i = 0; i < 4; i++) y[i] = k == 0 ? v[i].x : k == 1 ? v[i].y : k == 2 ? v[i].z : v[i].w;
          mma_f<C::H16>(o[4 * j + k], prmt(y[0], y[1], 0x5410u), prmt(y[0], y[1], 0x7632u), prmt(y[2], y[3], 0x5410u), prmt(y[2], y[3], 0x7632u), b0, b1);
        }
      }
    }
    float r[2 * C::MT]; const float* sign = P.sign_v + row.head * C::D + g * (C::D / 8);
#pragma unroll
    for (int i = 0; i < C::MT; i++) { r[2 * i] = (o[i][0] + o[i][1]) * sign[2 * i]; r[2 * i + 1] = (o[i][2] + o[i][3]) * sign[2 * i + 1]; }
    hadamard<4>(r, lane);                           // lane 4g + t holds dims (D/8) g + i of column t
    const float f = fac[n] * rsqrtf((float)C::D) * (1.f / unit_of(C::VF));            // as pages count
#pragma unroll
    for (int i = 0; i < 2 * C::MT; i++) s.O[n][i] = fmaf(r[i], f, s.O[n][i]);
  }
}
