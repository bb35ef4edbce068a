// Fills a Level from a Simd class. `Read` streams memory with the level's widest loads.
#ifndef KVFOLD_DEFINE_LEVEL_H
#define KVFOLD_DEFINE_LEVEL_H

#include <cstring>

#include "exact.h"
#include "fold.h"
#include "pages.h"

namespace kvfold {
namespace {

template <class Simd>
std::int64_t read_stream(const std::uint8_t* data, std::int64_t bytes) {
  constexpr int kAhead = 4096;  // bytes; the best of 1, 2, 4, 8, 16 KB where it was measured
  auto a = Simd::zero_int(), b = a, c = a, d = a;
  for (std::int64_t i = 0; i + 4 * Simd::kBytes <= bytes; i += 4 * Simd::kBytes) {
    for (int line = 0; line < 4 * Simd::kBytes; line += 64) Simd::prefetch(data + i + line + kAhead);
    a = Simd::add_int(a, Simd::load_ints(data + i));
    b = Simd::add_int(b, Simd::load_ints(data + i + Simd::kBytes));
    c = Simd::add_int(c, Simd::load_ints(data + i + 2 * Simd::kBytes));
    d = Simd::add_int(d, Simd::load_ints(data + i + 3 * Simd::kBytes));
  }
  return Simd::reduce_add_int(Simd::add_int(Simd::add_int(a, b), Simd::add_int(c, d)));
}

template <class Simd>
constexpr Level line_level(const char* name, const char* (*reason)()) {
  return {name, reason, prepare_lines<Simd>, attend_pages<Simd>, attend_exact<Simd>, fold<Simd>, hadamard<Simd>, read_stream<Simd>};
}

}  // namespace
}  // namespace kvfold
#endif
