// How the CUDA kernels share work among blocks and warps, walked through on the host: of random batches, every chunk and every exact item of every
// row is somebody's, once; blocks that add up a row's parts find them where the others have put them.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#define DI inline
#define __device__ inline
#define __noinline__
#include "../../src/kvfold/engine/cuda/kernels/share.cuh"

namespace {

struct Sequence {
  int chunks, exact;
};

void fail(const char* what, int a, int b) {
  std::printf("%s: %d, %d\n", what, a, b);
  std::exit(1);
}

// As engine/cuda/arguments.py has it; given by the test, so that the two cannot part.
struct Host {
  int blocks, parts;
};

void walk(const std::vector<Sequence>& batch, int H, int tiles, int W, int all, Host host) {
  const int B = static_cast<int>(batch.size());
  std::vector<int> first(MAX_BATCH + 2), exact(MAX_BATCH + 2);
  const Share share{first.data(), exact.data(), B, H, tiles};
  bool same = true;
  for (int b = 0; b < B; b++) share.put(b, batch[b].chunks, batch[b].exact, W, host.parts);
  for (int b = 1; b < B; b++) same = same && first[b + 1] == first[1];
  first[0] = 0;
  for (int b = 0; b < B; b++) first[b + 1] += first[b];
  share.choose_blocks(same, host.blocks, host.parts, all);
  if (share.total() == 0) return;
  const Cut cut = share.cut();
  std::vector<std::vector<int>> chunks(B * H * tiles), others(B * H * tiles), parts(B * H * tiles);
  for (int b = 0; b < B; b++)
    for (int k = 0; k < H * tiles; k++) {
      chunks[b * H * tiles + k].resize(batch[b].chunks);
      others[b * H * tiles + k].resize(batch[b].exact);
    }
  int expected = 0;
  for (int c = 0; c < share.blocks(); c++) {
    const int begin = cut.begin(c), end = begin + cut.size(c);
    if (begin != expected) fail("a block does not go on where the one before ended", begin, expected);
    expected = end;
    int rows = 0;
    for (int at = begin; at < end; rows++) {
      const Row row = share.locate(at);
      if (row.row != (row.b * H + row.head) * tiles + row.tile) fail("row number", row.row, row.head);
      parts[row.row].push_back(c);
      at = row.first + row.items;
    }
    if (first[MAX_BATCH + 1] && rows != 1) fail("a block has items of several rows", c, rows);
    for (int warp = 0; warp < W; warp++)
      for (int i = begin + warp; i < end; i += W) {
        const Row row = share.locate(i);
        const int x = i - row.first, chunk = row.chunk(x, W);
        if (x < 0 || x >= row.items || cut.block(i) != c) fail("an item is not where it is looked for", i, c);
        if (chunk >= 0)
          chunks[row.row].at(chunk)++;
        else if (x < row.middle + row.exact)
          others[row.row].at(x - row.middle)++;
      }
  }
  if (expected != share.total()) fail("items are left", expected, share.total());
  for (std::size_t r = 0; r < chunks.size(); r++) {
    for (int n : chunks[r]) if (n != 1) fail("a chunk was taken so many times", n, static_cast<int>(r));
    for (int n : others[r]) if (n != 1) fail("an exact item was taken so many times", n, static_cast<int>(r));
    for (std::size_t p = 1; p < parts[r].size(); p++)
      if (parts[r][p] != parts[r][p - 1] + 1) fail("a row's blocks are not neighbours", static_cast<int>(r), parts[r][p]);
  }
}

}  // namespace

// argv: random cases, then (rows, blocks, blocks of equal rows, parts) of the host for each number of rows it may meet
int main(int argc, char** argv) {
  std::mt19937 random(static_cast<unsigned>(std::atoi(argv[1])));
  auto draw = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
  const int all = std::atoi(argv[2]);
  for (int a = 3; a + 2 < argc; a += 3) {
    const int rows = std::atoi(argv[a]);
    const Host host{std::atoi(argv[a + 1]), std::atoi(argv[a + 2])};
    for (int repeat = 0; repeat < 40; repeat++) {
      int H = draw(1, 8), tiles = draw(1, 3), B = rows / (H * tiles);
      if (B < 1 || B > MAX_BATCH || B * H * tiles != rows) { H = rows <= MAX_BATCH ? 1 : rows / MAX_BATCH + 1; tiles = 1; B = rows / H; }
      if (B < 1 || B * H * tiles != rows || B > MAX_BATCH) continue;
      const bool keys = draw(0, 3) == 0, equal = draw(0, 1) == 1;
      const int longest = draw(0, 2) == 0 ? 12 : draw(0, 1) == 0 ? 400 : 2100;
      std::vector<Sequence> batch(B);
      for (Sequence& s : batch) s = {draw(0, longest), keys ? 0 : draw(1, 24)};
      if (equal) for (Sequence& s : batch) s = batch[0];
      walk(batch, H, tiles, draw(0, 1) == 0 ? 8 : 16, all, host);
    }
  }
  return 0;
}
