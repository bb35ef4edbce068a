// Which block does what, and the stream of pages into shared memory.
//
// A row = (sequence, KV head, tile of query columns). Its items are: pages, then exact items of 32 tokens (sinks, ring, new tokens),
// last because their loads are not prefetched and are slow while rings fill the queues of the memory system.
// All items of all rows lie on one line, in row order; the line is cut into equal parts, one per block (32-bit item numbers: enough for
// 2^31 pages and heads). A block thus sees the end of one row, whole rows, the start of another; warp w takes every W-th item of the block,
// across row borders, so no warp idles at a border. Each warp owns a ring of R slots of half pages' sides (K or V of 64 tokens).
#pragma once
#include "trellis.cuh"

// One row of a call. recent_k/v: exact tokens folded..length-1, token folded + e in slot (first + e) % ring of [H][stride / D][D];
// pages: addresses of ceil(folded / 128) pages; pad: the call's first tokens that are padding.
struct Sequence { u64 recent_k, recent_v, sink_k, sink_v, pages; int length, folded, pad, first, ring, unused; long long stride; };   // 72 bytes
struct Args {
  const void *q, *k, *v; void* out; const Sequence* seq; const float *sign_k, *sign_v; float* partial; int* count;
  long long q_b, q_h, q_i, k_b, k_h, k_i, v_b, v_h, v_i, o_b, o_h, o_i;                                            // strides in elements
  int B, H, G, Q, sinks, tiles; float scale; Levels key, value; const u32 *key_pairs, *value_pairs;           // tables of trellis.cuh
};
constexpr int MAX_BATCH = 128, EXACT_ITEM = 32;

// One kernel variant. W warps, R ring slots per warp, NG groups of 4 query columns, BULK: cp.async.bulk, H16: float16 model.
// MODE 0 real, 1 loads only, 2 arithmetic only (1 and 2 are for measuring: wrong results), 4 keys of pages only (logits.cu).
template <int D_, int KF_, int VF_, int MEAN_, int NG_, int W_, int R_, int BULK_, int H16_, int MODE_> struct Cfg {
  using Reg = Region<D_, KF_, VF_, MEAN_>;
  static constexpr int D = D_, KF = KF_, VF = VF_, MEAN = MEAN_, NG = NG_, W = W_, R = R_, BULK = BULK_, H16 = H16_, MODE = MODE_;
  static constexpr bool KEYS = MODE == 4; static constexpr int SIDES = KEYS ? 1 : 2;          // of half a page, each a slot
  static constexpr int THREADS = W * 32, COLS = 4 * NG, KT = D / 32, MT = D / 16, EPL = D / 32, STRIDE = D + 4;
  static constexpr int SLOT = Reg::K_HALF > Reg::V_HALF ? Reg::K_HALF : Reg::V_HALF;
  static constexpr int PARTIAL = COLS * (D + 2);                     // floats of one partial result
  static constexpr int K_TABLE = table_bytes(KF) * copies_of(KF), V_TABLE = table_bytes(VF) * copies_of(VF);
  // shared memory: rings | tables | barriers | q fragments rotated, raw | per column floats | m, l per warp | plan | merge buffer
  static constexpr int AT_TABLES = W * R * SLOT, AT_BARS = AT_TABLES + K_TABLE + V_TABLE, AT_Q = AT_BARS + (W * R * 8 + 15) / 16 * 16, Q_BYTES = COLS * D * 2;
  static constexpr int AT_COL = AT_Q + Q_BYTES * (1 + MEAN), AT_ML = AT_COL + COLS * 16 + 16, AT_PLAN = AT_ML + (W + 1) * COLS * 8;
  static constexpr int AT_ARGS = AT_PLAN + (MAX_BATCH + 2) * 8, AT_BUF = AT_ARGS + (sizeof(Args) + 15) / 16 * 16, FREE = SHARED_LIMIT - AT_BUF;
  static constexpr int FIT = FREE / (COLS * STRIDE * 4), ROUND = FIT >= W ? W : FIT >= W / 2 ? W / 2 : FIT >= W / 4 ? W / 4 : FIT >= W / 8 ? W / 8 : 1;
  static constexpr int SUB = W / COLS > ROUND ? ROUND : W / COLS > 0 ? W / COLS : 1;      // parts of the final merge done side by side
  static constexpr int SMEM = AT_BUF + ROUND * COLS * STRIDE * 4;
  static_assert(SMEM <= SHARED_LIMIT, "rings do not fit in shared memory");
};

// A line of `total` items in `blocks` parts; the first `more` parts are one item longer.
struct Cut {
  int each, more;
  DI Cut(int total, int blocks) { each = total / blocks; more = total - each * blocks; }
  DI int begin(int c) const { return c * each + (c < more ? c : more); }
  DI int block(int item) const { int longer = more * (each + 1); return item < longer ? item / (each + 1) : more + (item - longer) / each; }
};
struct Row { int b, head, tile, row, first, items, exact; };         // first: item number of its first item
struct Plan {
  int* first;      // [B + 1] item number of each sequence's first item
  int* exact;      // [B] exact items of one row of each sequence; at MAX_BATCH + 1 the number of blocks
  const Args& P;
  DI int total() const { return first[P.B]; }
  DI int blocks() const { return exact[MAX_BATCH + 1]; }
  DI Cut cut() const { return Cut(total(), blocks()); }
  // How many blocks share the work: all, or a few less if whole rows of one length then fit each block and nothing is merged between blocks.
  DI int choose_blocks(bool same) const {
    const int rows = P.B * P.H * P.tiles, all = gridDim.x;
    if (same && rows >= all - all / 16)
      for (int c = all; c >= all - all / 16; c--) if (rows % c == 0) return c;
    return total() < all ? total() : all;
  }
  DI Row locate(int item) const {
    int lo = 0, hi = P.B;
    while (hi - lo > 1) { int mid = (lo + hi) >> 1; if (first[mid] <= item) lo = mid; else hi = mid; }
    Row r; int rows = P.H * P.tiles, inside = item - first[lo];
    r.b = lo; r.items = (first[lo + 1] - first[lo]) / rows;
    int k = inside / r.items; r.row = lo * rows + k; r.head = k / P.tiles; r.tile = k - r.head * P.tiles;
    r.first = first[lo] + k * r.items; r.exact = exact[lo]; return r;
  }
};
DI int exact_tokens(const Args& P, int length, int folded, int pad) { return (folded > 0 ? P.sinks : 0) + length - folded + P.Q - pad; }
template <class C> DI void make_plan(const Args& P, Plan& plan) {    // all threads; ends with a barrier
  for (int b = threadIdx.x; b < P.B; b += C::THREADS) {
    const Sequence& s = P.seq[b]; int folded = ldg_int(&s.folded), n = exact_tokens(P, ldg_int(&s.length), folded, ldg_int(&s.pad));
    int e = C::KEYS ? 0 : n > 0 ? (n + EXACT_ITEM - 1) / EXACT_ITEM : 1;
    plan.exact[b] = e; plan.first[b + 1] = (e + ((folded + 127) >> 7)) * P.H * P.tiles;
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    int carry = 0, one = plan.first[1]; bool same = true;
    for (int b0 = 0; b0 < P.B; b0 += 32) {
      int b = b0 + threadIdx.x, x = b < P.B ? plan.first[b + 1] : 0; same &= __all_sync(~0u, b >= P.B || x == one);
#pragma unroll
      for (int s = 1; s < 32; s *= 2) { int y = __shfl_up_sync(~0u, x, s); if (threadIdx.x >= s) x += y; }
      x += carry; if (b < P.B) plan.first[b + 1] = x; carry = __shfl_sync(~0u, x, 31);
    }
    __syncwarp();                                 // thread 0 reads what another lane wrote
    if (threadIdx.x == 0) { plan.first[0] = 0; plan.exact[MAX_BATCH + 1] = plan.choose_blocks(same); }
  }
  __syncthreads();
}
template <class C> struct Ring {
  using Reg = typename C::Reg;
  u32 data, bars; int slot; u32 phase;                               // consumer
  u64 list; u32 mask; int half, next, end;                  // producer: addresses of 32 of this warp's items, one per lane
  DI void init(unsigned char* sm, int warp, int begin, int end_) {
    data = shared_address(sm) + warp * C::R * C::SLOT; bars = shared_address(sm) + C::AT_BARS + warp * C::R * 8;
    slot = 0; phase = 0; list = 0; mask = 0; half = 0; next = begin + warp; end = end_;
    if constexpr (C::BULK) {
      if ((threadIdx.x & 31) == 0) { for (int i = 0; i < C::R; i++) barrier_init(bars + i * 8); barrier_init_fence(); }
      __syncwarp();
    }
  }
  // Between pages: have the addresses of this and the next page at hand, as far as there are any.
  DI void refill(const Plan& plan) {
    while ((mask & (mask - 1)) == 0 && next < end) {
      const int lane = threadIdx.x & 31, kept = mask != 0, n = next + (lane - kept) * C::W; u64 a = 0;
      if (kept) a = __shfl_sync(~0u, list, __ffs(mask) - 1);
      if (lane >= kept) {
        a = 0;
        if (n < end) {
          const Row r = plan.locate(n); const int page = n - r.first;
          if (page < r.items - r.exact) a = ldg_u64((const void*)(plan.P.seq[r.b].pages + 8ull * page)) + (u64)r.head * Reg::BYTES;
        }
      }
      list = a; next += (32 - kept) * C::W; mask = __ballot_sync(~0u, a != 0);
    }
  }
  DI void issue() {                                  // the next half page's side into the current slot; all lanes
    if (mask != 0) {
      int from = __ffs(mask) - 1; u64 a = __shfl_sync(~0u, list, from); const u32 dst = data + slot * C::SLOT; u32 bytes;
      if (half & 2) a += Reg::HALF;
      if (half & 1) { a += Reg::K_HALF; bytes = Reg::V_HALF; } else bytes = Reg::K_HALF;
      if constexpr (C::BULK) { if ((threadIdx.x & 31) == 0) bulk_copy(dst, a, bytes, bars + slot * 8); }
      else for (u32 at = (threadIdx.x & 31) * 16; at < bytes; at += 512) async_copy16(dst + at, a + at);
      if ((half += 2 / C::SIDES) == 4) { half = 0; mask &= mask - 1; }
    }
    if constexpr (!C::BULK) async_commit();
  }
  DI void advance() { if (++slot == C::R) { slot = 0; phase ^= 1; } }
  DI void start(const Plan& plan) { for (int i = 0; i < C::R; i++) { if (i % (2 * C::SIDES) == 0) refill(plan); issue(); advance(); } slot = 0; phase = 0; }
  DI u32 wait() {                                                    // shared address of the current slot, once its bytes are there
    if constexpr (C::BULK) { if (C::MODE != 2 || phase == 0) barrier_wait(bars + slot * 8, phase); }
    else { async_wait<C::R - 1>(); __syncwarp(); }
    return data + slot * C::SLOT;
  }
  DI void release() {                                // all lanes have read the slot: fill it again, move on
    __syncwarp();
    if constexpr (C::MODE == 2) { if (++slot == C::R) { slot = 0; phase = 2; } }
    else { issue(); advance(); }
  }
};
