// The C interface: checks, and nothing but checks and calls.
#include <new>

#include "attend.h"
#include "kvfold_cpu.h"
#include "levels.h"
#include "pages.h"
#include "pool.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <cstring>

using kvfold::Layout;
using kvfold::Level;

#ifndef KVF_SOURCES
#define KVF_SOURCES ""
#endif

namespace {

bool usable(const kvf_format* format) { return format != nullptr && kvfold::supported(*format); }

bool foldable(const kvf_side& side) {
  if (side.trellis == nullptr) return true;
  if (side.search == nullptr || !kvfold::usable(*side.search) || side.search->period > 2) return false;
  if (side.searches != 1 && side.searches != 3) return false;
  for (int phase = 0; phase < 2; ++phase)
    if (side.search->width[phase % side.search->period] != side.trellis->widths[phase]) return false;
  return true;
}

bool usable(const kvf_attend_request& request) {
  if (!usable(request.format) || request.batch < 1 || request.query_tokens < 1 || request.query_heads < 1) return false;
  if (request.query_heads % request.format->kv_heads != 0) return false;
  if (request.query_heads / request.format->kv_heads > 64) return false;
  for (int b = 0; b < request.batch; ++b) {
    const kvf_sequence& s = request.sequences[b];
    if (s.folded < 0 || s.recent < 0) return false;
    if (s.recent_table != nullptr && s.recent_block < 1) return false;
    if (s.pads < 0 || s.pads > request.query_tokens) return false;
  }
  return true;
}

std::int64_t element_bytes(int dtype) { return dtype == KVF_FLOAT32 ? 4 : 2; }

const void* vector_at(const kvf_vectors& v, int dtype, std::int64_t outer, std::int64_t head) {
  return static_cast<const char*>(v.data) + (outer * v.outer_stride + head * v.head_stride) * element_bytes(dtype);
}

}  // namespace

extern "C" {

int32_t kvf_abi_version(void) { return KVF_ABI_VERSION; }

const char* kvf_sources(void) { return KVF_SOURCES; }

int32_t kvf_level_count(void) { return static_cast<int32_t>(kvfold::levels().size()); }

const char* kvf_level_name(int32_t level) { return kvfold::levels().at(level)->name; }

const char* kvf_level_reason(int32_t level) { return kvfold::levels().at(level)->reason(); }

int64_t kvf_row_bytes(const kvf_format* format) { return usable(format) ? static_cast<int64_t>(Layout(*format).row_bytes()) : 0; }

int32_t kvf_fold(const kvf_format* format, int32_t level, int32_t threads, int32_t dtype, kvf_vectors keys, kvf_vectors values,
                 int64_t pages, int32_t first_page, const uint64_t* rows) {
  if (!usable(format) || !foldable(format->key) || !foldable(format->value)) return KVF_UNSUPPORTED;
  const Level* chosen = kvfold::choose_level(level);
  if (chosen == nullptr) return KVF_NO_LEVEL;
  const Layout layout(*format);
  std::atomic<bool> finite{true};
  kvfold::parallel_for(threads, pages * format->kv_heads, [&](std::int64_t unit) {
    const std::int64_t page = unit / format->kv_heads, head = unit % format->kv_heads;
    kvfold::FoldTask task;
    task.format = format;
    task.trellis = &kvfold::trellis_encoder(*chosen);
    task.keys = vector_at(keys, dtype, page, head);
    task.values = vector_at(values, dtype, page, head);
    task.key_stride = keys.inner_stride;
    task.value_stride = values.inner_stride;
    task.row = reinterpret_cast<std::uint8_t*>(rows[page]);
    task.dtype = dtype;
    task.head = static_cast<int>(head);
    task.skipped = first_page != 0 && page == 0 ? format->sinks : 0;
    if (!chosen->fold(task)) finite = false;
    if (head == 0) std::memset(task.row + layout.used_bytes(), 0, layout.row_bytes() - layout.used_bytes());
  });
  return finite ? KVF_OK : KVF_NON_FINITE;
}

int32_t kvf_unfold(const kvf_format* format, int32_t level, const uint8_t* row, float* keys, float* values) {
  if (!usable(format)) return KVF_UNSUPPORTED;
  const Level* chosen = kvfold::choose_level(level);
  if (chosen == nullptr) return KVF_NO_LEVEL;
  kvfold::unfold(*format, *chosen, row, keys, values);
  return KVF_OK;
}

int32_t kvf_to_canonical(const kvf_format* format, const uint8_t* row, uint8_t* canonical) {
  if (!usable(format)) return KVF_UNSUPPORTED;
  kvfold::to_canonical(*format, row, canonical);
  return KVF_OK;
}

int32_t kvf_from_canonical(const kvf_format* format, const uint8_t* canonical, uint8_t* row) {
  if (!usable(format)) return KVF_UNSUPPORTED;
  kvfold::from_canonical(*format, canonical, row);
  return KVF_OK;
}

int32_t kvf_attend(const kvf_attend_request* request) {
  if (request == nullptr || !usable(*request)) return KVF_UNSUPPORTED;
  const Level* level = kvfold::choose_level(request->level);
  if (level == nullptr) return KVF_NO_LEVEL;
  try {
    kvfold::attend(*request, *level);
  } catch (const std::bad_alloc&) {
    return KVF_NO_MEMORY;
  }
  return KVF_OK;
}

void kvf_advise_huge(void* slab, int64_t bytes) {
#if defined(__linux__)
  const std::uintptr_t page = 4096, first = (reinterpret_cast<std::uintptr_t>(slab) + page - 1) / page * page;
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(slab) + static_cast<std::uintptr_t>(bytes)) / page * page;
  if (end > first) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  (void)slab;
  (void)bytes;
#endif
}

int64_t kvf_read(int32_t level, int32_t threads, const uint64_t* addresses, int64_t count, int64_t bytes) {
  const Level* chosen = kvfold::choose_level(level);
  if (chosen == nullptr) return 0;
  std::atomic<std::int64_t> sum{0};
  kvfold::parallel_for(threads, count, [&](std::int64_t i) {
    sum += chosen->read(reinterpret_cast<const std::uint8_t*>(addresses[i]), bytes);
  });
  return sum;
}

}  // extern "C"
