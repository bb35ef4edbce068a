// Attention of a tile of query rows over packed pages, for every level whose dot product walks code lines.
//
// Levels of trellis codes are unpacked first (trellis.h), a page of one KV head at a time; the dot product then reads them as they are. For
// few rows, readers that have kStreamRows multiply as they read.
//
//   score[r][t] = key_scale[t] * <L_t, x_r> * row_scale[r] + <query_r, mean of t's half page>      (units of log 2)
//   weight[r][t] = exp2(score - block peak) * value_scale[t], rounded to the 16-bit grid
//   output[r] += sum_t weight[r][t] * L_t                                              (rotated basis)
//
// Layout: ../format.h. Two pages make a block: one softmax over 256 scores. Integer products are exact; the only rounding is that of
// queries and weights to 16 bits. Limit: 256 levels of |63| times 32639 stay below 2^31.
#ifndef KVFOLD_PAGES_H
#define KVFOLD_PAGES_H

#include <cmath>
#include <cstring>
#include <optional>

#include "../format.h"
#include "level.h"
#include "softmax.h"
#include "trellis.h"
#include "unroll.h"

namespace kvfold {
namespace {

using Dot = void (*)(const Parts& parts, const std::uint8_t* operand, const std::int32_t* sum, const std::uint8_t* tables,
                     std::int32_t* out);

template <class Simd, int Bits, int Quads>
Dot dot_for_rows(int rows) {
  if (rows == 1) return Simd::template dot<Bits, Quads, 1>;
  if (rows == 2) return Simd::template dot<Bits, Quads, 2>;
  if (rows <= 4) return Simd::template dot<Bits, Quads, 4>;
  return Simd::template dot<Bits, Quads, 8>;
}

template <class Simd, int Bits>
Dot dot_for_quads(int quads, int rows) {
  if (quads == 16) return dot_for_rows<Simd, Bits, 16>(rows);
  if (quads == 32) return dot_for_rows<Simd, Bits, 32>(rows);
  if constexpr (Bits < kLevelBits)  // trellis codes have no head_dim of 96
    if (quads == 24) return dot_for_rows<Simd, Bits, 24>(rows);
  return dot_for_rows<Simd, Bits, 64>(rows);
}

template <class Simd>
Dot dot_for(int bits, int quads, int rows) {
  if (bits == TrellisReader<Simd>::kUnpacked) return dot_for_quads<Simd, TrellisReader<Simd>::kUnpacked>(quads, rows);
  if (bits == 4) return dot_for_quads<Simd, 4>(quads, rows);
  if (bits == 3) return dot_for_quads<Simd, 3>(quads, rows);
  return dot_for_quads<Simd, 2>(quads, rows);
}

template <class Simd>
void prepare_lines(QueryTile& tile, int dim) {
  std::memset(tile.operand, 0, sizeof tile.operand);
  for (int r = 0; r < tile.rows; ++r)
    for (int quad = 0; quad < dim / 4; ++quad)
      Simd::expand(tile.grid[r] + 4 * quad, tile.operand + r * kOperandRow + 8 * quad);
}

// <query, mean> of both halves of a page for rows [first, first + Rows).
template <class Simd, int Rows>
void mean_scores_of_rows(const std::int8_t* means, const std::uint8_t* scales, int dim, const QueryTile& tile, int first,
                         float (*bias)[kTileRows]) {
  for (int half = 0; half < kMeans; ++half) {
    typename Simd::Float sums[Rows];
    for (auto& sum : sums) sum = Simd::set(0.0f);
    for (int j = 0; j < dim; j += Simd::kWidth) {
      const auto mean = Simd::load_int8(means + half * dim + j);
      for (int r = 0; r < Rows; ++r) sums[r] = Simd::fma(mean, Simd::load(tile.query[first + r] + j), sums[r]);
    }
    std::uint16_t scale;
    std::memcpy(&scale, scales + 2 * half, sizeof scale);
    for (int r = 0; r < Rows; ++r) bias[half][first + r] = Simd::reduce_add(sums[r]) * half_to_float(scale);
  }
}

template <class Simd>
void mean_scores(const PagesTask& task, const Layout& layout, const std::uint8_t* page, int head, const QueryTile& tile,
                 float (*bias)[kTileRows]) {
  if (task.format->centre == 0) {
    std::memset(bias, 0, sizeof(float) * kMeans * kTileRows);
    return;
  }
  const auto* means = reinterpret_cast<const std::int8_t*>(page + layout.means(head));
  const std::uint8_t* scales = page + layout.mean_scales(head);
  int first = 0;
  for (; first + 4 <= tile.rows; first += 4)
    mean_scores_of_rows<Simd, 4>(means, scales, task.format->head_dim, tile, first, bias);
  for (; first < tile.rows; ++first) mean_scores_of_rows<Simd, 1>(means, scales, task.format->head_dim, tile, first, bias);
}

template <class Simd>
struct LineSink {  // weights of one block in the order dot() reads
  static constexpr bool kNeedsSums = Simd::kBias != 0;
  static_assert(kBlockTokens * 2 <= kOperandRow, "a row of weights fits");
  alignas(64) std::uint8_t operand[kOperandBytes];
  int quads;  // of a run of values that are read as streams, else 1
  void tick() {}
  void put(int row, int token, typename Simd::Int grid) {
    std::uint8_t* at = operand + row * kOperandRow + 2 * token;
    if constexpr (TrellisReader<Simd>::kStreamRows > 0)
      Simd::store_runs(grid, quads, at);
    else
      Simd::store_quads(grid, at);
  }
};

// Codes of one side of a page as dot() takes them: packed, or unpacked from a trellis to `levels`; and their tokens' scales. `bits` says
// what dot() reads.
template <class Simd>
struct SideReader {
  SideReader(const kvf_format& format, bool keys, int bias) : SideReader(format, keys ? format.key : format.value, keys, bias) {}
  SideReader(const kvf_format& format, const kvf_side& side, bool keys, int bias)
      : bits(side.trellis == nullptr ? side.bits : TrellisReader<Simd>::kUnpacked) {
    if (side.trellis == nullptr) {
      Simd::fill_tables(side.levels, side.bits, bias, tables);
    } else {
      trellis.emplace(format, keys, bias);
      Simd::fill_tables(side.trellis->levels, trellis_index_bits(*side.trellis), bias, tables);
    }
  }

  const std::uint8_t* keys(const std::uint8_t* codes, const std::uint8_t* headers) {
    if (!trellis) return codes;
    trellis->keys(codes, headers, levels);
    return levels;
  }
  const std::uint8_t* values(const std::uint8_t* codes, const std::uint8_t* headers, std::uint8_t* buffer) const {
    if (!trellis) return codes;
    trellis->values(codes, headers, buffer);
    return buffer;
  }
  void scales(const std::uint8_t* stored, const std::uint8_t* unit, float* out) const {
    if (trellis) return trellis_scales(stored, unit, out);
    load_scales<Simd>(stored, out);
  }

  const int bits;
  std::optional<TrellisReader<Simd>> trellis;
  alignas(64) std::uint8_t tables[64 * Simd::kTables];
  alignas(64) std::uint8_t levels[kPageTokens * kMaxDim];
};

template <class Simd>
struct PagesKernel {
  using Trellis = TrellisReader<Simd>;

  explicit PagesKernel(const PagesTask& work)
      : task(work), layout(*work.format), key(*work.format, true, Simd::kBias), value(*work.format, false, Simd::kBias),
        few(work.tile_count == 1 && work.tiles[0].rows <= Trellis::kStreamRows),
        block_pages((key.trellis || value.trellis) && !few ? 1 : kBlockPages) {
    std::memset(&sink, 0, sizeof sink);
    sink.quads = 1;
    if constexpr (Trellis::kStreamRows > 0)
      if (few && value.trellis) sink.quads = Trellis::value_quads(work.format->head_dim);
    std::memset(block.sum, 0, sizeof block.sum);  // dot() rounds the number of rows up
  }

  const std::uint8_t* page(std::int64_t index) const { return reinterpret_cast<const std::uint8_t*>(task.pages[index]); }

  void score(int which, int head, const QueryTile& tile) {
    const int quads = task.format->head_dim / 4, offset = which * kPageTokens;
    const Dot dot = dot_for<Simd>(key.bits, quads, tile.rows);
    const std::size_t group = few ? layout.key_bytes / kTokenGroups : Layout::group_bytes(quads, width_of(key.bits));
    float bias[kMeans][kTileRows];
    mean_scores<Simd>(task, layout, rows[which], head, tile, bias);
    const int groups = Simd::groups(tile.rows);
    for (int g0 = 0; g0 < kTokenGroups; g0 += groups) {
      const std::uint8_t* codes = keys[which] + g0 * group;
      if (few && key.trellis) {
        if constexpr (Trellis::kStreamRows > 0) {
          const Asking asking = part(keys[which], layout.key_bytes, ahead[which], g0 / groups, kTokenGroups / groups);
          key.trellis->key_sums(tile.rows, codes, key_starts[which] + g0 * kLanes, tile.operand, tile.sum, key.tables, asking, ints[0]);
        }
      } else {
        ask(next_values, groups * layout.value_bytes / kTokenGroups, g0 / groups);
        dot({{codes}, {ahead[which]}, 1}, tile.operand, tile.sum, key.tables, ints[0]);
      }
      for (int i = 0; i < groups; ++i)
        for (int l = 0; l < kLanes; l += Simd::kWidth) {
          const int token = (g0 + i) * kLanes + l;
          const auto scale = Simd::load(key_scales[which] + token);
          for (int r = 0; r < tile.rows; ++r)
            Simd::store(block.scores[r] + offset + token,
                        Simd::fma(Simd::load_int32(ints[i] + r * kLanes + l), Simd::mul(scale, Simd::set(tile.scale[r])),
                                  Simd::set(bias[token / kMeanTokens][r])));
        }
    }
  }

  void gather(int pages, TileState& state, int count) {
    const Dot dot = dot_for<Simd>(value.bits, kTokenQuads, count);
    const std::size_t group = Layout::group_bytes(kTokenQuads, width_of(value.bits));
    const int groups = Simd::groups(count);
    for (int g0 = 0; g0 < task.format->head_dim / kLanes; g0 += groups) {
      ask(next_keys, groups * layout.key_bytes / (layout.dim / kLanes), g0 / groups);
      Parts parts = {{}, {ahead[0], ahead[1]}, pages};
      for (int p = 0; p < pages; ++p) parts.codes[p] = values[p] + g0 * group;
      dot(parts, sink.operand, block.sum, value.tables, ints[0]);
      add_outputs(g0, groups, state, count);
    }
  }

  // The same from streams.
  void gather_streams(int pages, TileState& state, int count) {
    const int groups = sink.quads == 1 ? 2 : 1, steps = task.format->head_dim / kLanes / groups;
    const Parts parts = {{values[0], values[1]}, {}, pages};
    const std::uint8_t* const before[kBlockPages] = {value_before[0], value_before[1]};
    for (int i = 0; i < steps; ++i) {
      Asking asking[kBlockPages];
      for (int p = 0; p < pages; ++p) asking[p] = part(values[p], layout.value_bytes, ahead[p], i, steps);
      value.trellis->value_sums(count, i, parts, before, sink.operand, block.sum, value.tables, asking, ints[0]);
      add_outputs(i * groups, groups, state, count);
    }
  }

  void add_outputs(int first, int groups, TileState& state, int count) {
    for (int i = 0; i < groups; ++i)
      for (int r = 0; r < count; ++r)
        for (int l = 0; l < kLanes; l += Simd::kWidth) {
          float* out = state.output[r] + (first + i) * kLanes + l;
          Simd::store(out, Simd::fma(Simd::load_int32(ints[i] + r * kLanes + l), Simd::set(block.scale[r]), Simd::load(out)));
        }
  }

  // What the next KV head has in place of `bytes` bytes, part i of several.
  static Asking part(const std::uint8_t* codes, std::size_t bytes, std::ptrdiff_t to_next, int i, int parts) {
    bytes /= parts;
    return {codes + to_next + i * bytes, static_cast<std::ptrdiff_t>(bytes)};
  }

  // Asks for a part of the codes that are unpacked next. Unpacking reads them in less time than memory takes; the dot products before it
  // read none. Inlined like all prefetching: GCC takes a function that does nothing else for one without effect, and drops its calls.
  KVF_INLINE void ask(const std::uint8_t* codes, std::size_t bytes, int part) const {
    if (codes == nullptr) return;
    for (std::size_t i = 0; i < bytes; i += 64) Simd::prefetch_early(codes + part * bytes + i);
  }

  // What is read after head h of the pages from `index` on, and where codes are that are unpacked after the keys of this head and after
  // its values.
  void find_next(std::int64_t index, int pages, int h) {
    const bool last_head = h + 1 == task.head_count;
    for (int p = 0; p < pages; ++p) {
      const bool another = last_head && index + block_pages + p < task.count;
      const std::int64_t later = another ? index + block_pages + p : index + p;
      const int head = task.first_head + (last_head ? 0 : h + 1);
      ahead[p] = page(later) + layout.means(head) - (rows[p] + layout.means(task.first_head + h));
      if (task.tile_count == 1) ask_for_scales(page(later), head);
    }
    next_keys = next_values = nullptr;
    if (task.tile_count > 1 || few) return;
    if (value.trellis) next_values = page(index) + layout.value_codes(task.first_head + h);
    const bool same_page = h + 1 < task.head_count;
    if (!key.trellis || (!same_page && index + 1 == task.count)) return;
    next_keys = page(same_page ? index : index + 1) + layout.key_codes(task.first_head + (same_page ? h + 1 : 0));
  }

  // All of a head that is neither codes nor unit: the first bytes of every phase.
  void ask_for_scales(const std::uint8_t* row, int head) const {
    const std::uint8_t* means = row + layout.means(head);
    for (std::size_t i = 0; i < layout.key_codes(head) - layout.means(head); i += 64) Simd::prefetch_early(means + i);
    for (std::size_t i = 0; i < layout.value_scale_bytes; i += 64) Simd::prefetch_early(row + layout.value_scales(head) + i);
    Simd::prefetch_early(row + layout.mean_scales(head));
  }

  void open_keys(int which, std::int64_t index, int head) {
    const std::uint8_t* now = rows[which] = page(index);
    const std::uint8_t *codes = now + layout.key_codes(head), *headers = now + layout.key_scales(head);
    if constexpr (Trellis::kStreamRows > 0)
      if (few && key.trellis) key.trellis->open_keys(headers, key_starts[which]);
    keys[which] = few ? codes : key.keys(codes, headers);
    key.scales(now + layout.key_scales(head), now + layout.key_unit(head), key_scales[which]);
  }

  // A single tile is done with the keys by then: their buffer is still in the first level cache.
  void open_values(int which, int head) {
    const std::uint8_t *codes = rows[which] + layout.value_codes(head), *headers = rows[which] + layout.value_scales(head);
    if constexpr (Trellis::kStreamRows > 0)
      if (few && value.trellis) value.trellis->open_values(codes, headers, value_before[which]);
    values[which] = few ? codes : value.values(codes, headers, task.tile_count == 1 ? key.levels : value.levels);
  }

  void attend_tile(std::int64_t first, int pages, int head, const QueryTile& tile, TileState& state) {
    for (int p = 0; p < pages; ++p) score(p, head, tile);
    for (int p = 0; p < pages; ++p)
      value.scales(rows[p] + layout.value_scales(head), rows[p] + layout.value_unit(head), block.value_scales + p * kPageTokens);
    mask_block(block, task, first, pages, tile.rows);
    softmax<Simd>(block, pages, tile.rows, task.format->head_dim, state, sink);
    if (task.tile_count == 1)
      for (int p = 0; p < pages; ++p) open_values(p, head);
    if constexpr (Trellis::kStreamRows > 0)
      if (few && value.trellis) return gather_streams(pages, state, tile.rows);
    gather(pages, state, tile.rows);
  }

  void run() {
    for (std::int64_t first = 0; first < task.count; first += block_pages) {
      const int pages = task.count - first < block_pages ? 1 : block_pages;
      for (int h = 0; h < task.head_count; ++h) {
        const int head = task.first_head + h;
        for (int p = 0; p < pages; ++p) open_keys(p, first + p, head);
        if (task.tile_count > 1)
          for (int p = 0; p < pages; ++p) open_values(p, head);
        find_next(first, pages, h);
        for (int i = h * task.tile_count; i < (h + 1) * task.tile_count; ++i) attend_tile(first, pages, head, task.tiles[i], task.states[i]);
      }
    }
  }

  const PagesTask& task;
  const Layout layout;
  SideReader<Simd> key, value;
  const bool few;  // rows, for streams to be multiplied as they are read
  const int block_pages;
  const std::uint8_t *next_keys = nullptr, *next_values = nullptr;
  std::ptrdiff_t ahead[kBlockPages] = {};
  const std::uint8_t *rows[kBlockPages], *keys[kBlockPages], *values[kBlockPages];
  alignas(64) float key_scales[kBlockPages][kPageTokens];
  alignas(64) std::int32_t ints[kDotGroups][kTileRows * kLanes];
  alignas(64) std::uint8_t key_starts[kBlockPages][kPageTokens];
  alignas(64) std::uint8_t value_before[kBlockPages][kTokenQuads * 64];
  ScoreBlock block;
  LineSink<Simd> sink;
};

template <class Simd>
void attend_pages(const PagesTask& task) {
  PagesKernel<Simd>(task).run();
}

}  // namespace
}  // namespace kvfold
#endif
