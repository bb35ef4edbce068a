// AMX level: attention over pages with int8 tiles; everything else is the AVX-512 level.
//
// A tile of A holds the high and low bytes of 16-bit queries (or weights) as rows 2r and 2r+1, 64 coordinates (tokens) wide. A tile of
// B is 16 quads of unpacked levels, so a group of 16 lanes is D/64 tiles for keys and 2 for values (format.h). C gathers rows x lanes.
//
// A block of pages is a list of uniform steps, one group each: 8 per page for keys, D/16 per page for values. tileload does not forward
// from recent stores, so unpacking runs kAhead steps before the tile operations that read it; the ring of unpacked groups stays in L1.
// With many query tiles (prefill) and from trellis codes a block is unpacked once, before its tiles. Bound by memory at 4 and 3 bits, by the vector part of the
// softmax and by unpacking at 2.
#include <immintrin.h>

#include <utility>

#include "simd_avx512.h"
#include "trellis_avx512.h"
// The reader of trellis codes above is to be known before the templates that use it.
#include "define_level.h"
#include "x86.h"

namespace kvfold {
namespace {

using Simd = SimdAvx512;

constexpr int kPages = 1;  // of a block: rows are then read strictly in address order
constexpr int kLeadBytes = 8 << 10;  // prefetched ahead of unpacking, into the second level cache: best of 4, 8, 16 KB
constexpr int kSoftmaxShare = 25;    // per cent of the lines asked for during the softmax, about its share of the time
constexpr int kAhead = 3;
constexpr int kRing = 4;
constexpr int kTileBytes = 1024;

// Tile operations as assembly: GCC's intrinsics take literal register numbers only. They do not tell the compiler which memory they
// read and write, hence the barriers around them.
inline void barrier() { __asm__ volatile("" ::: "memory"); }

template <int Tile>
inline void load_tile(const void* rows) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(std::int64_t{64}), "i"(Tile));
}

template <int Tile>
inline void store_tile(void* rows) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(std::int64_t{64}), "i"(Tile) : "memory");
}

template <int Tile>
inline void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(Tile));
}

// C += A x B, signed bytes.
template <int C, int A, int B>
inline void multiply_tiles() {
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// Levels of one group, 64 bytes per quad.
template <int Bits, int Quads>
void unpack(const std::uint8_t* src, std::uint8_t* out, const std::uint8_t* tables) {
  const auto ask = [](const std::uint8_t* line) KVF_INLINE_LAMBDA { Simd::prefetch_codes(line); };
  walk_groups<Bits, Quads, 1>(src, ask, [&](int quad, const Lines<1>& codes, auto table) KVF_INLINE_LAMBDA {
    _mm512_store_si512(out + 64 * quad, Simd::lookup(codes.of[0], _mm512_load_si512(tables + 64 * table)));
  });
}

using Unpack = void (*)(const std::uint8_t* src, std::uint8_t* out, const std::uint8_t* tables);

Unpack unpack_for(int bits, int quads) {
  if (bits == kIndexBits) return quads == 16 ? unpack<kIndexBits, 16> : quads == 32 ? unpack<kIndexBits, 32> : unpack<kIndexBits, 64>;
  if (quads == 16) return bits == 4 ? unpack<4, 16> : bits == 3 ? unpack<3, 16> : unpack<2, 16>;
  if (quads == 24) return bits == 4 ? unpack<4, 24> : bits == 3 ? unpack<3, 24> : unpack<2, 24>;
  if (quads == 32) return bits == 4 ? unpack<4, 32> : bits == 3 ? unpack<3, 32> : unpack<2, 32>;
  return bits == 4 ? unpack<4, 64> : bits == 3 ? unpack<3, 64> : unpack<2, 64>;
}

// [tile of 64 columns][row 2r high, 2r + 1 low][64]
void prepare_tiles(QueryTile& tile, int dim) {
  std::memset(tile.operand, 0, sizeof tile.operand);
  for (int r = 0; r < tile.rows; ++r)
    for (int j = 0; j < dim; ++j) {
      std::uint8_t* high = tile.operand + j / 64 * kTileBytes + 2 * r * 64 + j % 64;
      high[0] = static_cast<std::uint8_t>((tile.grid[r][j] + 128) >> 8);
      high[64] = static_cast<std::uint8_t>(tile.grid[r][j]);
    }
}

struct TileSink {  // softmax weights as A tiles, two per page
  alignas(64) std::uint8_t operand[kPages][2 * kTileBytes];
  static constexpr bool kNeedsSums = false;
  void put(int row, int token, __m512i grid) {
    std::uint8_t* high = operand[token / kPageTokens] + token % kPageTokens / 64 * kTileBytes + 2 * row * 64 + token % 64;
    // The high byte is the second byte of grid + 128; one permutation gathers sixteen of each.
    const __m512i both = _mm512_mask_blend_epi8(0x2222222222222222ull, grid, _mm512_add_epi32(grid, _mm512_set1_epi32(128)));
    const __m256i bytes = _mm512_castsi512_si256(_mm512_permutexvar_epi8(_mm512_load_si512(kGather), both));
    _mm_store_si128(reinterpret_cast<__m128i*>(high), _mm256_castsi256_si128(bytes));
    _mm_store_si128(reinterpret_cast<__m128i*>(high + 64), _mm256_extracti128_si256(bytes, 1));
  }
  alignas(64) static constexpr std::uint8_t kGather[64] = {1, 5, 9,  13, 17, 21, 25, 29, 33, 37, 41, 45, 49, 53, 57, 61,
                                                           0, 4, 8,  12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60};
};

struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};

// Which tile registers play which part. Queries take a tile per 64 coordinates; at 96 half of the second is zeros, so that the levels
// beside it do not count.
template <int Dim>
struct Tiles {
  static constexpr int kKeys = (Dim + 63) / 64;
  static constexpr int kB = kKeys == 4 ? 4 : 2;
  static constexpr int kC = Dim / kLanes % 4 == 0 && kKeys < 4 ? 4 : 6;
  static constexpr int kSums = 8 - kC;  // groups in flight

  static void configure(int rows) {
    TileConfig config;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = 64;
      config.rows[i] = static_cast<std::uint8_t>(i == kB || i == kB + 1 ? 16 : 2 * rows);
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory");
  }
};

template <int kDim>
struct TilesKernel {
  using T = Tiles<kDim>;
  static constexpr int kValueGroups = kDim / kLanes;
  static constexpr int kSlotBytes = kLanes * (kDim > kPageTokens ? kDim : kPageTokens);
  static constexpr int kMaxSteps = kPages * (kTokenGroups + kValueGroups);

  explicit TilesKernel(const PagesTask& work)
      : task(work), layout(*work.format), key(*work.format, true, 0), value(*work.format, false, 0),
        fused(work.tile_count == 1 && !key.trellis && !value.trellis) {
    unpack_key = unpack_for(key.bits, kDim / 4);
    unpack_value = unpack_for(value.bits, kTokenQuads);
    value_group = Layout::group_bytes(kTokenQuads, width_of(value.bits));
    key_group = Layout::group_bytes(kDim / 4, width_of(key.bits));
    std::memset(&sink, 0, sizeof sink);
  }

  const std::uint8_t* page(std::int64_t index) const { return reinterpret_cast<const std::uint8_t*>(task.pages[index]); }

  // A block of pages for one KV head, and where each of its steps reads: keys page by page, then values kSums coordinate groups at a
  // time.
  struct Block {
    std::int64_t first_page = 0;
    int pages = 0, head = 0, key_steps = 0, count = 0;
    const std::uint8_t* sources[kMaxSteps];
  };

  void plan(std::int64_t item, Block& out) const {
    out.first_page = item / task.head_count * kPages;
    out.head = task.first_head + static_cast<int>(item % task.head_count);
    out.pages = task.count - out.first_page >= kPages ? kPages : 1;
    const std::uint8_t** source = out.sources;
    for (int p = 0; p < out.pages; ++p)
      for (int g = 0; g < kTokenGroups; ++g) *source++ = page(out.first_page + p) + layout.key_codes(out.head) + g * key_group;
    out.key_steps = out.pages * kTokenGroups;
    for (int g0 = 0; g0 < kValueGroups; g0 += T::kSums)
      for (int p = 0; p < out.pages; ++p)
        for (int g = g0; g < g0 + T::kSums; ++g)
          *source++ = page(out.first_page + p) + layout.value_codes(out.head) + g * value_group;
    out.count = out.pages * (kTokenGroups + kValueGroups);
  }

  void unpack_step(const Block& of, int step, std::uint8_t* out) const {
    if (step < of.key_steps)
      unpack_key(of.sources[step], out, key.tables);
    else
      unpack_value(of.sources[step], out, value.tables);
  }

  // All of a block at once, which is a page.
  void unpack_block() {
    static_assert(kPages == 1, "readers hold one page");
    const std::uint8_t* row = page(now->first_page);
    const std::uint8_t* keys = key.keys(row + layout.key_codes(now->head), row + layout.key_scales(now->head));
    const std::uint8_t* values = value.values(row + layout.value_codes(now->head), row + layout.value_scales(now->head), value.levels);
    for (int g = 0; g < kTokenGroups; ++g) unpack_key(keys + g * key_group, unpacked + g * kSlotBytes, key.tables);
    for (int g = 0; g < kValueGroups; ++g)
      unpack_value(values + g * value_group, unpacked + (kTokenGroups + g) * kSlotBytes, value.tables);
  }

  // Asks for the next lines of the stream of rows. Called at an even pace in all phases: memory idles whenever nothing is asked for.
  void advance(int lines) {
    if (!fused) return;
    for (int i = 0; i < lines; ++i) _mm_prefetch(reinterpret_cast<const char*>(cursor) + 64 * i, _MM_HINT_T1);
    cursor += 64 * lines;
    if (cursor < cursor_end) return;
    if (cursor_page + 1 < task.count) ++cursor_page;
    point_cursor();
  }

  void point_cursor() {
    cursor = page(cursor_page) + layout.means(task.first_head);
    cursor_end = page(cursor_page) + layout.means(task.first_head + task.head_count);
  }

  struct PacedSink {
    static constexpr bool kNeedsSums = TileSink::kNeedsSums;
    TilesKernel& kernel;
    int lines;  // per tick
    void put(int row, int token, __m512i grid) { kernel.sink.put(row, token, grid); }
    void tick() { kernel.advance(lines); }
  };

  // The unpacked group of a step. While fused, also unpacks the one kAhead steps later, in this block or the next.
  const std::uint8_t* group(int step) {
    if (!fused) return unpacked + step * kSlotBytes;
    const int later = step + kAhead;
    std::uint8_t* slot = unpacked + (phase + later) % kRing * kSlotBytes;
    if (later < now->count)
      unpack_step(*now, later, slot);
    else
      unpack_step(*next, later - now->count, slot);
    barrier();
    return unpacked + (phase + step) % kRing * kSlotBytes;
  }

  template <int Sum>
  static void store_sum(std::int32_t (*out)[kTileRows * 2][kLanes]) {
    store_tile<T::kC + Sum>(out[Sum]);
  }

  template <int Sum>
  void key_step(int step) {
    const std::uint8_t* levels = group(step);
    advance(step_lines);
    zero_tile<T::kC + Sum>();
    unroll<T::kKeys>([&](auto index) {
      constexpr int t = decltype(index)::value;
      load_tile<T::kB + t % 2>(levels + t * kTileBytes);
      multiply_tiles<T::kC + Sum, t, T::kB + t % 2>();
    });
  }

  // Integer sums of one group of keys -> scores.
  void convert_scores(const QueryTile& tile, int step) {
    const int p = step / kTokenGroups, g = step % kTokenGroups, token = g * kLanes;
    const __m512 scale = _mm512_load_ps(key_scales[p] + token);
    const auto* sum = sums[step % T::kSums];
    for (int r = 0; r < tile.rows; ++r) {
      const __m512 dot = whole(sum, r), s = _mm512_mul_ps(scale, _mm512_set1_ps(tile.scale[r]));
      _mm512_store_ps(block.scores[r] + p * kPageTokens + token,
                      _mm512_fmadd_ps(dot, s, _mm512_set1_ps(bias[p][token / kMeanTokens][r])));
    }
  }

  static __m512 whole(const std::int32_t (*sum)[kLanes], int r) {
    return _mm512_fmadd_ps(Simd::load_int32(sum[2 * r]), _mm512_set1_ps(256.0f), Simd::load_int32(sum[2 * r + 1]));
  }

  void score(const QueryTile& tile) {
    barrier();
    unroll<T::kKeys>([&](auto t) { load_tile<decltype(t)::value>(tile.operand + decltype(t)::value * kTileBytes); });
    for (int step = 0; step < now->key_steps; step += T::kSums)
      unroll<T::kSums>([&](auto index) {
        constexpr int i = decltype(index)::value;
        if (step > 0) store_sum<i>(sums);
        key_step<i>(step + i);
        if (step > 0) convert_scores(tile, step + i - T::kSums);
      });
    unroll<T::kSums>([&](auto index) { store_sum<decltype(index)::value>(sums); });
    for (int i = 0; i < T::kSums; ++i) convert_scores(tile, now->key_steps - T::kSums + i);
  }

  template <int Sum>
  void value_step(int step) {
    const std::uint8_t* levels = group(step);
    advance(step_lines);
    load_tile<T::kB>(levels);
    multiply_tiles<T::kC + Sum, 0, T::kB>();
    load_tile<T::kB + 1>(levels + kTileBytes);
    multiply_tiles<T::kC + Sum, 1, T::kB + 1>();
  }

  void gather(TileState& state, int rows) {
    int step = now->key_steps;
    for (int g0 = 0; g0 < kValueGroups; g0 += T::kSums) {
      barrier();
      unroll<T::kSums>([](auto i) { zero_tile<T::kC + decltype(i)::value>(); });
      for (int p = 0; p < now->pages; ++p) {
        load_tile<0>(sink.operand[p]);
        load_tile<1>(sink.operand[p] + kTileBytes);
        unroll<T::kSums>([&](auto index) { value_step<decltype(index)::value>(step + decltype(index)::value); });
        step += T::kSums;
      }
      unroll<T::kSums>([&](auto index) { store_sum<decltype(index)::value>(sums); });
      for (int i = 0; i < T::kSums; ++i)
        for (int r = 0; r < rows; ++r) {
          float* out = state.output[r] + (g0 + i) * kLanes;
          _mm512_store_ps(out, _mm512_fmadd_ps(whole(sums[i], r), _mm512_set1_ps(block.scale[r]), _mm512_load_ps(out)));
        }
    }
  }

  void attend_tile(const QueryTile& tile, TileState& state) {
    for (int p = 0; p < now->pages; ++p) {
      const std::uint8_t* row = page(now->first_page + p);
      mean_scores<Simd>(task, layout, row, now->head, tile, bias[p]);
      key.scales(row + layout.key_scales(now->head), row + layout.key_unit(now->head), key_scales[p]);
      value.scales(row + layout.value_scales(now->head), row + layout.value_unit(now->head), block.value_scales + p * kPageTokens);
    }
    score(tile);
    mask_block(block, task, now->first_page, now->pages, tile.rows);
    PacedSink paced{*this, softmax_lines};
    softmax<Simd>(block, now->pages, tile.rows, kDim, state, paced);
    gather(state, tile.rows);
  }

  void run() {
    T::configure(task.tiles[0].rows);
    const std::int64_t items = (task.count + kPages - 1) / kPages * task.head_count;
    plan(0, *now);
    if (fused) {
      point_cursor();
      advance(kLeadBytes / 64);
      const int lines = static_cast<int>((layout.means(1) - layout.means(0)) / 64);
      const int ticks = kPageTokens / Simd::kWidth * softmax_passes(task.tiles[0].rows);
      softmax_lines = lines * kSoftmaxShare / 100 / ticks;
      step_lines = (lines - softmax_lines * ticks + now->count - 1) / now->count;
      for (int i = 0; i < kAhead; ++i) unpack_step(*now, i, unpacked + i * kSlotBytes);
    }
    for (std::int64_t item = 0; item < items; ++item) {
      plan(item + 1 < items ? item + 1 : item, *next);
      if (!fused) unpack_block();
      const int head = now->head - task.first_head;
      for (int i = head * task.tile_count; i < (head + 1) * task.tile_count; ++i) attend_tile(task.tiles[i], task.states[i]);
      phase = (phase + now->count) % kRing;
      std::swap(now, next);
    }
    __asm__ volatile("tilerelease" ::: "memory");
  }

  const PagesTask& task;
  const Layout layout;
  SideReader<Simd> key, value;
  const bool fused;
  Unpack unpack_key, unpack_value;
  std::size_t key_group, value_group;
  Block blocks[2];
  Block *now = &blocks[0], *next = &blocks[1];
  int phase = 0, step_lines = 0, softmax_lines = 0;
  const std::uint8_t *cursor = nullptr, *cursor_end = nullptr;
  std::int64_t cursor_page = 0;
  float bias[kPages][kMeans][kTileRows];
  alignas(64) float key_scales[kPages][kPageTokens];
  alignas(64) std::int32_t sums[4][kTileRows * 2][kLanes];
  alignas(64) std::uint8_t unpacked[kMaxSteps * kSlotBytes];
  TileSink sink;
  ScoreBlock block;
};

void attend_tiles(const PagesTask& task) {
  if (task.format->head_dim == 64) return TilesKernel<64>(task).run();
  if (task.format->head_dim == 96) return TilesKernel<96>(task).run();
  if (task.format->head_dim == 128) return TilesKernel<128>(task).run();
  TilesKernel<256>(task).run();
}

}  // namespace

const Level kAmx = {"amx",       amx_reason, prepare_tiles,      attend_tiles, attend_exact<Simd>,
                    fold<Simd>, hadamard<Simd>, read_stream<Simd>};
}  // namespace kvfold
