// What a decode step reads from a layer's pools, worked out from the block tables of the program that owns them, without the host: the same code is
// compiled for the host by a test. Block 0 is the owner's null block: tokens there have no exact copy.
//   past = length - Q. Read through pages: tokens before the window, whole pages of them, and those whose exact copies are gone; the rest exactly.
//   The page that the call's first token falls into lies in the workspace whole, from slot `front` on: what completes it is folded from there.
// Layout: k, v [B, Q, H, D] and exact [blocks, H, tokens, 2 D], 16 bits; work [2][capacity][H][rows][D], then sinks [2][capacity][H][sinks][D].
#pragma once
#include "sequence.cuh"
constexpr int PAGE = 128, LOST = 2;                // LOST: exact tokens that nothing else holds are gone

struct EnterArgs {
  const int *lengths, *page_table, *exact_table; const void *k, *v; void* exact; unsigned char* pages; void* work;
  Sequence* seq; unsigned long long *address, *full; int* status;                         // per row: pages' addresses; of the page that the call completes
  long long page_row, exact_row, k_b, k_i, k_h, v_b, v_i, v_h, exact_block, exact_head, exact_token, page_block, page_one, address_row;   // elements; pages: bytes
  int H, Q, window, sinks, block_pages, exact_shift, front, rows, capacity;               // exact_shift: tokens of an exact block, as a power of two
};
// A row as it is before the call. here: whether it is a request at all; a graph's batch is filled up with rows that are none.
struct Past { int tokens, length, folded, page; bool here, lost; };
DI Past past_of(const EnterArgs& P, int b) {
  const int* exact = P.exact_table + b * P.exact_row; const int length = P.lengths[b], past = length - P.Q, size = 1 << P.exact_shift;
  if (past < 0 || exact[past >> P.exact_shift] == 0) return {0, 0, 0, 0, false, past >= 0 && P.page_table[b * P.page_row] != 0};
  const int page = past / PAGE * PAGE; int folded = past > P.window ? (past - P.window) / PAGE * PAGE : 0;
  for (int i = folded >> P.exact_shift; i * size < past; i++) if (exact[i] == 0) folded = (i + 1) * size;
  const bool lost = folded > page || (folded > 0 && P.sinks > 0 && exact[0] == 0);
  return {past, length, lost ? page : folded, page, true, lost};
}
DI long long place(const EnterArgs& P, int b, int head, int value, int tokens) { return (((long long)value * P.capacity + b) * P.H + head) * tokens; }
DI unsigned long long address_of(const EnterArgs& P, int b, int page) {
  const long long block = (P.page_table + b * P.page_row)[page / P.block_pages];
  return (unsigned long long)P.pages + block * P.page_block + page % P.block_pages * P.page_one;
}
// Row b in words: for the kernels of attention and folding.
template <int D> DI void describe(const EnterArgs& P, int b, const Past& r) {
  const unsigned long long work = (unsigned long long)P.work, sunk = work + 4ull * P.capacity * P.H * P.rows * D;
  Sequence s;
  s.recent_k = work + 2 * D * place(P, b, 0, 0, P.rows); s.recent_v = work + 2 * D * place(P, b, 0, 1, P.rows);
  s.sink_k = sunk + 2 * D * place(P, b, 0, 0, P.sinks); s.sink_v = sunk + 2 * D * place(P, b, 0, 1, P.sinks);
  s.pages = (unsigned long long)(P.address + b * P.address_row);
  s.length = r.tokens; s.folded = r.folded; s.pad = 0; s.first = P.front - (r.page - r.folded); s.ring = P.rows; s.unused = 0; s.stride = (long long)P.rows * D;
  P.seq[b] = s;
  P.full[b] = r.here && r.length >= r.page + PAGE ? address_of(P, b, r.page / PAGE) | (r.page == 0) : 0;
  if (r.lost) *P.status = LOST;
}
// Exact tokens and sinks of one head's keys or values into the workspace; the addresses of the row's pages by all its heads and sides together.
template <int D> DI void gather(const EnterArgs& P, int b, int head, int value, int thread, int threads) {
  const Past r = past_of(P, b); const int* exact = P.exact_table + b * P.exact_row; const int side = 2 * head + value;
  if (side == 0 && thread == 0) describe<D>(P, b, r);
  for (int p = side * threads + thread; p * PAGE < r.folded; p += 2 * P.H * threads) P.address[b * P.address_row + p] = address_of(P, b, p);
  constexpr int PARTS = D / 8, AHEAD = 4;          // of 16 bytes; asked for before any is stored
  const int recent = r.tokens - r.folded, all = (recent + (r.folded > 0 ? P.sinks : 0)) * PARTS, slot = P.front - (r.page - r.folded), mask = (1 << P.exact_shift) - 1;
  const unsigned short* from = (const unsigned short*)P.exact + head * P.exact_head + value * D;
  unsigned short *work = (unsigned short*)P.work, *kept = work + place(P, b, head, value, P.rows) * D;
  unsigned short* sunk = work + 2ll * P.capacity * P.H * P.rows * D + place(P, b, head, value, P.sinks) * D;
  for (int n = thread; n < all; n += AHEAD * threads) {
    uint4 x[AHEAD];
#pragma unroll
    for (int j = 0; j < AHEAD; j++) {
      const int i = n + j * threads, e = i / PARTS, token = e < recent ? r.folded + e : e - recent;
      if (i < all) x[j] = ((const uint4*)(from + exact[token >> P.exact_shift] * P.exact_block + (token & mask) * P.exact_token))[i % PARTS];
    }
#pragma unroll
    for (int j = 0; j < AHEAD; j++) {
      const int i = n + j * threads, e = i / PARTS;
      if (i < all) ((uint4*)(e < recent ? kept + (slot + e) * D : sunk + (e - recent) * D))[i % PARTS] = x[j];
    }
  }
}
// The call's own tokens into their exact blocks, which may be blocks that `gather` has read, and behind the gathered ones.
template <int D> DI void store(const EnterArgs& P, int b, int head, int value, int thread, int threads) {
  const Past r = past_of(P, b); if (!r.here) return;
  constexpr int PARTS = D / 8; const int mask = (1 << P.exact_shift) - 1; const int* exact = P.exact_table + b * P.exact_row;
  const unsigned short* from = value ? (const unsigned short*)P.v + b * P.v_b + head * P.v_h : (const unsigned short*)P.k + b * P.k_b + head * P.k_h;
  unsigned short *to = (unsigned short*)P.exact + head * P.exact_head + value * D, *work = (unsigned short*)P.work + place(P, b, head, value, P.rows) * D;
  for (int i = thread; i < P.Q * PARTS; i += threads) {
    const int n = i / PARTS, token = r.tokens + n, block = exact[token >> P.exact_shift];
    const uint4 x = ((const uint4*)(from + n * (value ? P.v_i : P.k_i)))[i % PARTS];
    ((uint4*)(work + (P.front + token - r.page) * D))[i % PARTS] = x;
    if (block != 0) ((uint4*)(to + block * P.exact_block + (token & mask) * P.exact_token))[i % PARTS] = x;
  }
}
