// One attention call: queries are cut into sets of rows and pages into chunks, each unit computes a partial softmax, partials are merged
// by log-sum-exp in a fixed order. The cut depends on shapes only, so results do not depend on threads.
//
//   few rows (decode):   units = sequence x page chunks of all KV heads, and the exact part per KV head; a second pass merges
//   many rows (prefill): units = (sequence, KV head, set of 64 rows), each over all pages, finished on the spot
#include "attend.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>

#include "half.h"
#include "pool.h"
#include "streams.h"

namespace kvfold {
namespace {

constexpr int kSetTiles = 8;
constexpr int kSetRows = kSetTiles * kTileRows;
constexpr std::int64_t kChunkPages = 32;  // 4096 tokens: long enough to hide the start of a unit
constexpr int kUnits = 64;
constexpr float kLog2E = 1.44269504088896341f;

// Memory a thread keeps from call to call, 64-byte aligned, contents undefined: fresh pages cost more than the attention of a short
// context. Slots tell apart arrays that live at the same time.
class Scratch {
 public:
  Scratch() = default;
  ~Scratch() { free(); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* reserve(std::size_t bytes) {  // throws bad_alloc, then holds nothing
    if (bytes > bytes_) {
      free();
      memory_ = ::operator new(bytes, std::align_val_t{64});
      bytes_ = bytes;
    }
    return memory_;
  }

 private:
  void free() {
    if (memory_ != nullptr) ::operator delete(memory_, std::align_val_t{64});
    memory_ = nullptr;
    bytes_ = 0;
  }
  void* memory_ = nullptr;
  std::size_t bytes_ = 0;
};

template <class T>
T* scratch(std::size_t count) {
  static thread_local Scratch memory;
  return static_cast<T*>(memory.reserve(count * sizeof(T)));
}

std::int64_t page_count(const kvf_sequence& sequence) { return (sequence.folded + kPageTokens - 1) / kPageTokens; }

std::size_t element_bytes(int dtype) { return dtype == KVF_FLOAT32 ? 4 : 2; }

const char* vector_at(const kvf_vectors& v, int dtype, std::int64_t outer, std::int64_t head, std::int64_t inner) {
  const std::int64_t index = outer * v.outer_stride + head * v.head_stride + inner * v.inner_stride;
  return static_cast<const char*>(v.data) + index * static_cast<std::int64_t>(element_bytes(dtype));
}

float element(const char* data, int dtype, int index) {
  if (dtype == KVF_FLOAT32) {
    float value;
    std::memcpy(&value, data + 4 * index, sizeof value);
    return value;
  }
  std::uint16_t half;
  std::memcpy(&half, data + 2 * index, sizeof half);
  return dtype == KVF_BFLOAT16 ? bfloat16_to_float(half) : half_to_float(half);
}

void store_element(char* data, int dtype, int index, float value) {
  if (dtype == KVF_FLOAT32) {
    std::memcpy(data + 4 * index, &value, sizeof value);
    return;
  }
  const std::uint16_t half = dtype == KVF_BFLOAT16 ? float_to_bfloat16(value) : float_to_half(value);
  std::memcpy(data + 2 * index, &half, sizeof half);
}

void reset(TileState* states, int tiles, int dim) {
  for (int i = 0; i < tiles; ++i) {
    for (int r = 0; r < kTileRows; ++r) {
      states[i].peak[r] = kNothing;
      states[i].total[r] = 0.0f;
      std::memset(states[i].output[r], 0, sizeof(float) * dim);
    }
  }
}

// The rows of one (sequence, KV head), query token by query token: row n is query head n % group of token pads + n / group.
struct Rows {
  const kvf_attend_request& request;
  const Level& level;
  int sequence, head, group;
  std::int64_t first;  // of this set
  int count;
  int tiles;  // at least what count needs; tiles beyond have no rows

  const kvf_sequence& source() const { return request.sequences[sequence]; }
  int dim() const { return request.format->head_dim; }
  std::int64_t token(int row) const { return source().pads + (first + row) / group; }
  int query_head(int row) const { return head * group + static_cast<int>((first + row) % group); }

  void prepare(QueryTile* out) const;
  void pages(int heads, const QueryTile* queries, TileState* states, std::int64_t begin, std::int64_t end) const;
  void exact(const QueryTile* queries, TileState* states) const;
  void finish(const QueryTile* queries, const TileState* paged, std::int64_t parts, std::int64_t stride, const TileState* exact) const;
};

void prepare_row(const Rows& rows, int row, QueryTile& tile, int r) {
  const int dim = rows.dim();
  const float scale = rows.request.softmax_scale * kLog2E;
  const char* query = vector_at(rows.request.query, rows.request.query_dtype, rows.sequence, rows.query_head(row), rows.token(row));
  const float* signs = rows.request.format->key_signs + static_cast<std::ptrdiff_t>(rows.head) * dim;
  alignas(64) float rotated[kMaxDim];
  for (int j = 0; j < dim; ++j) {
    const float value = element(query, rows.request.query_dtype, j);
    rotated[j] = value * signs[j];
    tile.query[r][j] = value * scale;
  }
  rows.level.hadamard(rotated, dim);
  float top = 1e-30f;
  bool finite = true;
  for (int j = 0; j < dim; ++j) {
    finite &= std::fabs(rotated[j]) <= std::numeric_limits<float>::max();
    top = std::max(top, std::fabs(rotated[j]));
  }
  tile.finite[r] = finite;
  tile.scale[r] = finite ? top / kGridTop * scale / std::sqrt(static_cast<float>(dim)) : 0.0f;
  const float to_grid = kGridTop / top;
  for (int j = 0; j < dim; ++j) {
    if (!finite) tile.query[r][j] = rotated[j] = 0.0f;
    const auto grid = static_cast<std::int16_t>(std::lrint(rotated[j] * to_grid));
    tile.grid[r][place(*rows.request.format, true, j)] = grid;
    tile.sum[r] += grid;
  }
}

void Rows::prepare(QueryTile* out) const {
  for (int i = 0; i < tiles; ++i) {
    QueryTile& tile = out[i];
    tile.rows = std::clamp(count - i * kTileRows, 0, kTileRows);
    for (int r = 0; r < kTileRows; ++r) tile.sum[r] = 0;
    for (int r = 0; r < tile.rows; ++r) prepare_row(*this, i * kTileRows + r, tile, r);
    level.prepare(tile, dim());
  }
}

// Pages [begin, end) for this KV head and the heads - 1 after it.
void Rows::pages(int heads, const QueryTile* queries, TileState* states, std::int64_t begin, std::int64_t end) const {
  PagesTask task;
  task.format = request.format;
  task.pages = source().pages + begin;
  task.count = end - begin;
  task.first_head = head;
  task.head_count = heads;
  task.first_token = begin == 0 ? std::max<std::int64_t>(request.format->sinks, source().skipped) : 0;
  task.end_token = source().folded - begin * kPageTokens;
  task.tiles = queries;
  task.states = states;
  task.tile_count = tiles;
  if (task.count > 0) level.pages(task);
}

void Rows::exact(const QueryTile* queries, TileState* states) const {
  const kvf_sequence& s = source();
  std::int64_t limits[kSetRows];
  ExactTask task;
  task.limits = limits;
  task.tiles = queries;
  task.states = states;
  task.dtype = request.exact_dtype;
  task.dim = dim();
  task.tile_count = tiles;
  const auto run = [&](const kvf_vectors& k, const kvf_vectors& v, std::int64_t outer, std::int64_t start, std::int64_t tokens) {
    if (tokens <= 0) return;
    task.keys = vector_at(k, task.dtype, outer, head, start);
    task.values = vector_at(v, task.dtype, outer, head, start);
    task.key_stride = k.inner_stride;
    task.value_stride = v.inner_stride;
    task.count = tokens;
    level.exact(task);
  };
  std::fill(limits, limits + kSetRows, std::numeric_limits<std::int64_t>::max());
  if (s.folded > 0) run(s.sink_key, s.sink_value, 0, 0, request.format->sinks);
  const std::int64_t stretch = s.recent_table == nullptr ? s.recent : s.recent_block;
  for (std::int64_t t = 0; t < s.recent; t += stretch) {
    const std::int64_t block = s.recent_table == nullptr ? 0 : s.recent_table[t / stretch];
    run(s.recent_key, s.recent_value, block, 0, std::min(stretch, s.recent - t));
  }
  for (int row = 0; row < count; ++row) limits[row] = token(row) - s.pads + 1;
  run(request.new_key, request.new_value, sequence, s.pads, limits[count - 1]);
}

// Merges the partial softmaxes of a row, turns the paged part back into the model's basis and writes the output.
void finish_row(const Rows& rows, int row, const QueryTile& tile, int r, const TileState* paged, std::int64_t parts,
                std::int64_t stride, const TileState& exact) {
  const int dim = rows.dim();
  alignas(64) float rotated[kMaxDim] = {};
  float peak = exact.peak[r];
  for (std::int64_t p = 0; p < parts; ++p) peak = std::max(peak, paged[p * stride].peak[r]);
  const float exact_weight = std::exp2(exact.peak[r] - peak);
  float total = exact_weight * exact.total[r];
  for (std::int64_t p = 0; p < parts; ++p) {
    const TileState& part = paged[p * stride];
    const float weight = std::exp2(part.peak[r] - peak);
    total += weight * part.total[r];
    for (int j = 0; j < dim; ++j) rotated[j] += weight * part.output[r][place(*rows.request.format, false, j)];
  }
  rows.level.hadamard(rotated, dim);
  const kvf_attend_request& request = rows.request;
  const float* signs = request.format->value_signs + static_cast<std::ptrdiff_t>(rows.head) * dim;
  const float norm = 1.0f / std::sqrt(static_cast<float>(dim));
  const bool poisoned = !tile.finite[r];
  const std::int64_t index =
      (static_cast<std::int64_t>(rows.sequence) * request.query_heads + rows.query_head(row)) * request.query_tokens + rows.token(row);
  char* out = static_cast<char*>(request.output) + index * dim * static_cast<std::int64_t>(element_bytes(request.query_dtype));
  for (int j = 0; j < dim; ++j) {
    const float value = (signs[j] * rotated[j] * norm + exact_weight * exact.output[r][j]) / total;
    store_element(out, request.query_dtype, j, poisoned ? std::numeric_limits<float>::quiet_NaN() : value);
  }
}

void Rows::finish(const QueryTile* queries, const TileState* paged, std::int64_t parts, std::int64_t stride,
                  const TileState* exact) const {
  for (int row = 0; row < count; ++row) {
    const int i = row / kTileRows, r = row % kTileRows;
    finish_row(*this, row, queries[i], r, paged + i, parts, stride, exact[i]);
  }
}

// Pages per unit: enough units for many threads, few enough that merging them stays cheap.
std::int64_t chunk_pages(std::int64_t pages, int batch) {
  const std::int64_t chunks = std::max(1, kUnits / batch), even = (pages + chunks - 1) / chunks;
  return std::max(kChunkPages, (even + 1) / 2 * 2);
}

// The call as units: per sequence, `parts` chunks of pages with all KV heads, then one exact unit per KV head.
struct Split {
  Split(const kvf_attend_request& r, const Level& l)
      : request(r), level(l), heads(r.format->kv_heads), group(r.query_heads / heads),
        tiles((group * r.query_tokens + kTileRows - 1) / kTileRows) {
    for (int b = 0; b < r.batch; ++b) {
      const std::int64_t pages = page_count(r.sequences[b]), chunk = chunk_pages(pages, r.batch);
      parts = std::max(parts, (pages + chunk - 1) / chunk);
    }
  }

  Rows rows(std::int64_t sequence, std::int64_t head) const {
    const int count = group * (request.query_tokens - static_cast<int>(request.sequences[sequence].pads));
    return {request, level, static_cast<int>(sequence), static_cast<int>(head), group, 0, count, tiles};
  }
  // Tile states: [sequence][part, exact last][head][tile].
  std::int64_t state(std::int64_t sequence, std::int64_t part, std::int64_t head) const {
    return ((sequence * (parts + 1) + part) * heads + head) * tiles;
  }

  void prepare(std::int64_t job, QueryTile* queries) const { rows(job / heads, job % heads).prepare(queries + job * tiles); }

  void attend(std::int64_t unit, const QueryTile* queries, TileState* states) const {
    const std::int64_t sequence = unit / (parts + heads), which = unit % (parts + heads);
    const bool exact = which >= parts;
    const std::int64_t head = exact ? which - parts : 0;
    TileState* mine = states + state(sequence, exact ? parts : which, head);
    reset(mine, exact ? tiles : heads * tiles, request.format->head_dim);
    const Rows first = rows(sequence, head);
    if (first.count == 0) return;
    const QueryTile* tile = queries + (sequence * heads + head) * tiles;
    if (exact) return first.exact(tile, mine);
    const std::int64_t pages = page_count(request.sequences[sequence]), chunk = chunk_pages(pages, request.batch);
    first.pages(heads, tile, mine, std::min(pages, which * chunk), std::min(pages, (which + 1) * chunk));
  }

  void finish(std::int64_t job, const QueryTile* queries, const TileState* states) const {
    const std::int64_t sequence = job / heads, head = job % heads;
    rows(sequence, head).finish(queries + job * tiles, states + state(sequence, 0, head), parts, heads * tiles,
                                states + state(sequence, parts, head));
  }

  const kvf_attend_request& request;
  const Level& level;
  const int heads, group, tiles;
  std::int64_t parts = 0;
};

// All rows of a (sequence, KV head) fit one set: split the pages.
void attend_split(const kvf_attend_request& request, const Level& level) {
  const Split split(request, level);
  const std::int64_t jobs = std::int64_t{request.batch} * split.heads;
  auto* queries = scratch<QueryTile>(jobs * split.tiles);
  auto* states = scratch<TileState>(jobs * (split.parts + 1) * split.tiles);
  parallel_for(request.threads, jobs, [&](std::int64_t job) { split.prepare(job, queries); });
  parallel_for(request.threads, request.batch * (split.parts + split.heads),
               [&](std::int64_t unit) { split.attend(unit, queries, states); });
  parallel_for(request.threads, jobs, [&](std::int64_t job) { split.finish(job, queries, states); });
}

// Many rows: one unit per set.
void attend_sets(const kvf_attend_request& request, const Level& level) {
  const int heads = request.format->kv_heads, group = request.query_heads / heads;
  const std::int64_t sets = (static_cast<std::int64_t>(group) * request.query_tokens + kSetRows - 1) / kSetRows;
  parallel_for(request.threads, request.batch * heads * sets, [&](std::int64_t unit) {
    const std::int64_t job = unit / sets, first = unit % sets * kSetRows;
    const int sequence = static_cast<int>(job / heads);
    const std::int64_t all = static_cast<std::int64_t>(group) * (request.query_tokens - request.sequences[sequence].pads);
    if (first >= all) return;
    const int count = static_cast<int>(std::min<std::int64_t>(kSetRows, all - first));
    const Rows rows{request, level, sequence, static_cast<int>(job % heads), group, first, count, (count + kTileRows - 1) / kTileRows};
    auto* queries = scratch<QueryTile>(kSetTiles);
    auto* paged = scratch<TileState>(2 * kSetTiles);
    TileState* exact = paged + kSetTiles;
    reset(paged, 2 * kSetTiles, rows.dim());
    rows.prepare(queries);
    rows.pages(1, queries, paged, 0, page_count(rows.source()));
    rows.exact(queries, exact);
    rows.finish(queries, paged, 1, kSetTiles, exact);
  });
}

void clear_pads(const kvf_attend_request& request) {
  const std::size_t vector = element_bytes(request.query_dtype) * request.format->head_dim;
  for (int b = 0; b < request.batch; ++b)
    for (int h = 0; h < request.query_heads; ++h) {
      const std::int64_t first = (static_cast<std::int64_t>(b) * request.query_heads + h) * request.query_tokens;
      std::memset(static_cast<char*>(request.output) + first * vector, 0, request.sequences[b].pads * vector);
    }
}

}  // namespace

void attend(const kvf_attend_request& request, const Level& level) {
  clear_pads(request);
  const int group = request.query_heads / request.format->kv_heads;
  if (static_cast<std::int64_t>(group) * request.query_tokens <= kSetRows)
    attend_split(request, level);
  else
    attend_sets(request, level);
}

}  // namespace kvfold
