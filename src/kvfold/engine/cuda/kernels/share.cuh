// Which block does what: nothing but integers, so that it is also compiled and tested on the host (tests/kernels/share_covers.cpp).
//
// A row = (sequence, KV head, tile of query columns). Its items are chunks (half pages) and, amid them, exact items of 32 tokens (sinks, ring,
// new tokens): a warp waits for each load of theirs, and meanwhile others keep the memory busy. They take about as long as three chunks, so
// where a block has many, the warps that have an exact item are given nothing for two more turns.
// All items of all rows lie on one line, in row order, which is cut into equal parts, one per block (32-bit item numbers: enough for
// 2^30 pages and heads): each row by itself where rows are equally long and blocks enough, because a border inside a block costs a second
// query, merge and wait, else the whole line. Warp w takes every W-th item of the block, across row borders, so no warp idles at a border.
#pragma once
constexpr int MAX_BATCH = 128, EXACT_ITEM = 32, CHUNK = 64, EXACT_TURNS = 3;

// A line of items cut into blocks: every `span` of them into `parts`, of which the first `more` are one item longer.
struct Cut {
  int span, parts, each, more;
  DI Cut(int span_, int parts_) : span(span_), parts(parts_) { each = span / parts; more = span - each * parts; }
  DI int begin(int c) const { const int s = c / parts, k = c - s * parts; return s * span + k * each + (k < more ? k : more); }
  DI int size(int c) const { return each + (c % parts < more); }
  DI int block(int item) const {
    const int s = item / span, i = item - s * span, longer = more * (each + 1);
    return s * parts + (i < longer ? i / (each + 1) : more + (i - longer) / each);
  }
};
struct Row {                                       // first: item number of its first item; exact items follow `middle` chunks
  int b, head, tile, row, first, items, exact, middle, turns;
  DI void put(volatile Row& to) const {
    to.b = b; to.head = head; to.tile = tile; to.row = row; to.first = first; to.items = items; to.exact = exact; to.middle = middle; to.turns = turns;
  }
  // The chunk that is item x of the row, or -1: an exact item, or an empty one in the next `turns` - 1 turns of all W warps.
  DI int chunk(int x, int W) const volatile {
    if (x < middle) return x;
    const int at = x - middle, turn = turns == 1 ? 0 : at / W, from = at - turn * W;
    if (turn >= turns) return x - turns * exact;
    return from < exact ? -1 : x - (turn + 1) * exact;
  }
};
// Not inlined: five copies of it are code to fetch, at a kernel's start as costly as running it.
__device__ __noinline__ Row locate_item(const int* first, const int* exact, int B, int H, int tiles, int item) {
  int lo = 0, hi = B;
  while (hi - lo > 1) { int mid = (lo + hi) >> 1; if (first[mid] <= item) lo = mid; else hi = mid; }
  Row r; int rows = H * tiles; r.b = lo; r.items = (first[lo + 1] - first[lo]) / rows;
  int k = (item - first[lo]) / r.items; r.row = lo * rows + k; r.head = tiles == 1 ? k : k / tiles; r.tile = k - r.head * tiles;
  r.first = first[lo] + k * r.items; r.exact = exact[lo] & 0xffff; r.turns = exact[lo] >> 16;
  r.middle = (r.items - r.exact * r.turns) / 2; return r;
}
struct Share {
  int* first;      // [B + 1] item number of each sequence's first item; at MAX_BATCH + 1 the parts of a row, 0: the line is cut as a whole
  int* exact;      // [B] exact items of a row, the turns each takes in the upper half; at MAX_BATCH + 1 the number of blocks
  int B, H, tiles;
  DI int total() const { return first[B]; }
  DI int blocks() const { return exact[MAX_BATCH + 1]; }
  DI Cut cut() const { const int parts = first[MAX_BATCH + 1]; return parts ? Cut(first[1] / (H * tiles), parts) : Cut(total(), blocks()); }
  // A sequence's items, not yet summed up. parts: of a row, if rows turn out to be equally long.
  DI void put(int b, int chunks, int exact_items, int W, int parts) const {
    const int turns = exact_items <= W && chunks >= 8 * W * (parts > 1 ? parts : 1) ? EXACT_TURNS : 1;
    exact[b] = exact_items | turns << 16; first[b + 1] = (chunks + exact_items * turns) * H * tiles;
  }
  // same: all rows are equally long, and shared out as the host has worked it out. all: blocks that are there.
  DI void choose_blocks(bool same, int blocks_same, int parts, int all) const {
    const bool even = same && total() >= blocks_same;
    exact[MAX_BATCH + 1] = even ? blocks_same : total() < all ? total() : all; first[MAX_BATCH + 1] = even ? parts : 0;
  }
  DI Row locate(int item) const { return locate_item(first, exact, B, H, tiles, item); }
};
