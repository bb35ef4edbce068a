// What one SIMD level provides. A level is one source file built with its own instruction flags; everything it shares with other
// levels is a template in an anonymous namespace, so that no function built for one processor is linked into another's path.
#ifndef KVFOLD_LEVEL_H
#define KVFOLD_LEVEL_H

#include <cstddef>
#include <cstdint>

#include "../format.h"
#include "../trellis_encoder.h"

namespace kvfold {

// Queries travel in tiles of at most this many rows: 16 accumulators of high and low bytes fill the registers of every level.
constexpr int kTileRows = 8;
// Queries and softmax weights are 16-bit integers 256 * high + low with signed bytes, hence this largest value.
constexpr float kGridTop = 32639.0f;
// With every code line the one this far ahead is asked for, into the first level cache (best of 1 to 16 KB, both levels, on Zen 4).
constexpr int kPrefetchBytes = 2048;
// What a dot product reads instead of packed codes, where pages of trellis codes are unpacked first. Lines of 64 bytes, one quad in each.
enum Unpacked : int {
  kLevelBits = 8,   // levels as they are
  kIndexBits = 24,  // indices of levels, above which a byte may have other bits
};
// Bits that a code, or what stands for it, takes of a line.
constexpr int width_of(int bits) { return bits & 15; }
// Operands of line levels: row by row, eight bytes per quad.
constexpr int kOperandRow = kMaxDim / 4 * 8;
constexpr int kOperandBytes = kTileRows * kOperandRow;

constexpr int kBlockPages = 2;  // share a softmax
constexpr int kDotGroups = 2;   // of lanes, at most, that a dot product takes; its sums are [group][8 rows][16 lanes]

// Codes of the same lanes in one page or two: their dot products add up, over operands that follow each other.
struct Parts {
  const std::uint8_t* codes[kBlockPages];
  std::ptrdiff_t ahead[kBlockPages];  // from a line of packed codes to the same of the next KV head, which a level may ask for early
  int count;
};

// Bytes that are read after the next phase, to be asked for at an even pace: in bursts they would keep each other waiting.
struct Asking {
  const std::uint8_t* codes;
  std::ptrdiff_t bytes;
};

// Query rows of one KV head, ready for integer dot products.
struct QueryTile {
  int rows;
  bool finite[kTileRows];                             // false: the output row is NaN
  float scale[kTileRows];                            // integer dot x token scale -> score in units of log 2
  std::int32_t sum[kTileRows];                       // of grid
  alignas(64) std::int16_t grid[kTileRows][kMaxDim];  // rotated query on the integer grid
  alignas(64) float query[kTileRows][kMaxDim];        // unrotated, times softmax scale x log2 e
  alignas(64) std::uint8_t operand[kOperandBytes];    // grid in the order the level's dot product reads
};

// Running softmax of the rows of a tile: sum of exp2(score - peak), and the same sum over values.
struct TileState {
  float peak[kTileRows];
  float total[kTileRows];
  alignas(64) float output[kTileRows][kMaxDim];
};

constexpr float kNothing = -1e30f;  // peak of no token at all

// tile_count tiles for each of head_count consecutive KV heads.
struct PagesTask {
  const kvf_format* format;
  const std::uint64_t* pages;
  const QueryTile* tiles;
  TileState* states;
  std::int64_t count;
  std::int64_t first_token;  // tokens counted from pages[0]: those before first_token are sinks, read exactly instead,
  std::int64_t end_token;    // those from end_token on are not tokens of the sequence
  int first_head;
  int head_count;
  int tile_count;
};

// Exact tokens: consecutive vectors in memory. Row r of tile i sees the first limits[8 i + r] of them.
struct ExactTask {
  const void* keys;
  const void* values;
  const std::int64_t* limits;
  const QueryTile* tiles;
  TileState* states;
  std::int64_t key_stride, value_stride;  // elements from token to token
  std::int64_t count;
  int dtype;
  int dim;
  int tile_count;
};

struct FoldTask {
  const kvf_format* format;
  const TrellisEncoder* trellis;  // the level's
  const void* keys;
  const void* values;
  std::uint8_t* row;
  std::int64_t key_stride, value_stride;
  int dtype;
  int head;
  int skipped;  // first tokens left out of the mean and of a trellis side's unit
};

struct Level {
  const char* name;
  const char* (*reason)();                                      // "" if it can run here
  void (*prepare)(QueryTile& tile, int dim);                    // grid -> operand
  void (*pages)(const PagesTask& task);                         // attention over pages, rotated basis
  void (*exact)(const ExactTask& task);                         // attention over exact tokens
  bool (*fold)(const FoldTask& task);                           // one head of one page; false: a scale is not finite
  void (*hadamard)(float* vector, int dim);                     // unnormalised, in place
  std::int64_t (*read)(const std::uint8_t* data, std::int64_t bytes);
};

extern const Level kScalar;
#if defined(__x86_64__) || defined(_M_X64)
extern const Level kAvx2, kAvxVnni, kAvx512Vnni;
#if defined(__linux__)
extern const Level kAmx;
#endif
#elif defined(__aarch64__)
extern const Level kNeon;
#endif

}  // namespace kvfold
#endif
