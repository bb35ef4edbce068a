// The stream of pages into shared memory. Each warp owns a ring of R slots of chunks' sides (K or V of 64 tokens).
#pragma once
#include "computed.cuh"
#include "share.cuh"
#include "sequence.cuh"

struct Args {
  const void *q, *k, *v; void* out; const Sequence* seq; const float *sign_k, *sign_v; float* partial; int* count;
  long long q_b, q_h, q_i, k_b, k_h, k_i, v_b, v_h, v_i, o_b, o_h, o_i;                                            // strides in elements
  int B, H, G, Q, sinks, tiles, blocks, parts; float scale; Levels key, value; const u32 *key_pairs, *value_pairs;           // tables of trellis.cuh
};

// One kernel variant. W warps, R ring slots per warp, NG groups of 4 query columns, BULK: cp.async.bulk, H16: float16 model.
// MODE 0 real, 1 loads only, 2 arithmetic only (1 and 2 are for measuring: wrong results), 4 keys of pages only (logits.cu).
template <int D_, int KF_, int VF_, int MEAN_, int NG_, int W_, int R_, int BULK_, int H16_, int MODE_> struct Cfg {
  using Reg = Region<D_, KF_, VF_, MEAN_>;
  static constexpr int D = D_, KF = KF_, VF = VF_, MEAN = MEAN_, NG = NG_, W = W_, R = R_, BULK = BULK_, H16 = H16_, MODE = MODE_;
  static constexpr bool KEYS = MODE == 4; static constexpr int SIDES = KEYS ? 1 : 2;          // of a chunk, each a slot
  static constexpr int THREADS = W * 32, COLS = 4 * NG, KT = D / 32, MT = D / 16, EPL = D / 32, STRIDE = D + 4;
  static constexpr int SLOT = Reg::K_HALF > Reg::V_HALF ? Reg::K_HALF : Reg::V_HALF;
  static constexpr int PARTIAL = COLS * (D + 2);                     // floats of one partial result
  static constexpr int K_TABLE = table_bytes(KF) * copies_of(KF), V_TABLE = table_bytes(VF) * copies_of(VF);
  // shared memory: rings | tables | barriers | q fragments rotated, raw, of computed codes two thirds of the rotated | per column floats | m, l per warp | plan | merge buffer
  static constexpr int AT_TABLES = W * R * SLOT, AT_BARS = AT_TABLES + K_TABLE + V_TABLE, AT_Q = AT_BARS + (W * R * 8 + 15) / 16 * 16, Q_BYTES = COLS * D * 2;
  static constexpr int AT_COL = AT_Q + Q_BYTES * (1 + MEAN + is_computed(KF)), AT_ML = AT_COL + COLS * 16 + 16, AT_PLAN = AT_ML + (W + 1) * COLS * 8;
  static constexpr int AT_ARGS = AT_PLAN + (MAX_BATCH + 2) * 8, AT_HERE = AT_ARGS + (sizeof(Args) + 15) / 16 * 16, AT_BUF = AT_HERE + 64, FREE = SHARED_LIMIT - AT_BUF;
  static constexpr int FIT = FREE / (COLS * STRIDE * 4), ROUND = FIT >= W ? W : FIT >= W / 2 ? W / 2 : FIT >= W / 4 ? W / 4 : FIT >= W / 8 ? W / 8 : 1;
  static constexpr int SMEM = AT_BUF + ROUND * COLS * STRIDE * 4;
  static_assert(SMEM <= SHARED_LIMIT, "rings do not fit in shared memory");
};

struct Plan : Share {
  const Args& P;
  DI Plan(unsigned char* at, const Args& P_) : Share{(int*)at, (int*)at + MAX_BATCH + 2, P_.B, P_.H, P_.tiles}, P(P_) {}
};
DI int exact_tokens(const Args& P, int length, int folded, int pad) { return (folded > 0 ? P.sinks : 0) + length - folded + P.Q - pad; }
template <class C> DI void make_plan(const Args& P, Plan& plan) {    // all threads; ends with a barrier
  for (int b = threadIdx.x; b < P.B; b += C::THREADS) {
    const Sequence& s = P.seq[b]; int folded = ldg_int(&s.folded), n = exact_tokens(P, ldg_int(&s.length), folded, ldg_int(&s.pad));
    plan.put(b, (folded + CHUNK - 1) / CHUNK, C::KEYS ? 0 : n > 0 ? (n + EXACT_ITEM - 1) / EXACT_ITEM : 1, C::W, P.parts); touch(&s.pages);
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
    if (threadIdx.x == 0) { plan.first[0] = 0; plan.choose_blocks(same, P.blocks, P.parts, gridDim.x); }
  }
  __syncthreads();
}
// What a block is at, in shared memory, because registers are for the chunks: a value that spills is fetched through a first-level cache
// that shared memory has taken nearly all of. Read as volatile, or the compiler keeps it.
struct Here { Row row; int from, to, begin, end; }; // the row; its items in this block; all of the block's
template <class C> struct Ring {
  using Reg = typename C::Reg;
  u32 data, bars; int turn;                          // consumer: the number of the side that is read next
  u64 list, now; u32 mask; int next;                 // producer: addresses of 32 of this warp's items, one per lane; of the chunk being loaded
  DI void init(unsigned char* sm, int warp, int begin) {
    data = shared_address(sm) + warp * C::R * C::SLOT; bars = shared_address(sm) + C::AT_BARS + warp * C::R * 8;
    turn = 0; list = now = 0; mask = 0; next = begin + warp;
    if constexpr (C::BULK) {
      if ((threadIdx.x & 31) == 0) { for (int i = 0; i < C::R; i++) barrier_init(bars + i * 8); barrier_init_fence(); }
      __syncwarp();
    }
  }
  // Between chunks. Asks for the addresses of 32 more items when the last one is being loaded; they arrive while it is.
  DI void refill(const Plan& plan, int end) {
    while (mask == 0 && next < end) {
      const int n = next + (threadIdx.x & 31) * C::W; int chunk = -1; list = 0;
      if (n < end) {
        const Row r = plan.locate(n); chunk = r.chunk(n - r.first, C::W);
        if (chunk >= 0) list = ldg_u64((const void*)(ldg_u64(&plan.P.seq[r.b].pages) + 8ull * (chunk >> 1))) + (u64)r.head * Reg::BYTES + (chunk & 1) * Reg::HALF;
      }
      next += 32 * C::W; mask = __ballot_sync(~0u, chunk >= 0);
    }
  }
  DI void take() { now = 0; if (mask != 0) { now = __shfl_sync(~0u, list, __ffs(mask) - 1); mask &= mask - 1; } }
  DI void issue(int number) {                        // this warp's side `number` into its slot; all lanes
    if (now != 0) {
      const bool value = C::SIDES == 2 && number % 2; const u32 at = number % C::R, dst = data + at * C::SLOT, bytes = value ? Reg::V_HALF : Reg::K_HALF;
      const u64 from = value ? now + Reg::K_HALF : now;
      if constexpr (C::BULK) { if ((threadIdx.x & 31) == 0) bulk_copy(dst, from, bytes, bars + at * 8); }
      else for (u32 b = (threadIdx.x & 31) * 16; b < bytes; b += 512) async_copy16(dst + b, from + b);
    }
    if constexpr (!C::BULK) async_commit();
    if (C::SIDES == 1 || number % 2) take();
  }
  DI void start(const Plan& plan, int end) {
    refill(plan, end); take();
    for (int i = 0; i < C::R; i++) { refill(plan, end); issue(i); }
  }
  DI u32 wait() {                                    // shared address of the next side, once its bytes are there
    const u32 at = (u32)turn % C::R;
    if constexpr (C::BULK) { if (C::MODE != 2 || turn < C::R) barrier_wait(bars + at * 8, (u32)turn / C::R & 1); }
    else { async_wait<C::R - 1>(); __syncwarp(); }
    return data + at * C::SLOT;
  }
  DI void release() {                                // all lanes have read it: fill its slot again, move on
    __syncwarp();
    if constexpr (C::MODE != 2) issue(turn + C::R);
    turn++;
  }
};
