// One walk over the packed codes of a group of 16 lanes, for every SIMD level.
//
// walk<Simd, Bits, Quads>(src, part, visit) reads the lines of a group and calls visit(quad, indices) for each of its quads, where
// `indices` holds in every byte the code of one lane (in its low bits; higher bits are whatever the line held, the lookup ignores
// them). `part` selects a register's width of every 64-byte line. Layout: format.h. Of pages that were unpacked see level.h.
// Packed lines are prefetched at the pace of the walk, by its first part: asked for in bursts they would keep each other waiting.
// merge() joins two bits and one to a code; where kMergesPairs says so, in both halves of a byte, which are fields f and f + 4.
#ifndef KVFOLD_PLANES_H
#define KVFOLD_PLANES_H

#include <cstdint>

#include "level.h"
#include "unroll.h"

namespace kvfold {
namespace {

// What levels with this walk have in common: dot() takes one group of lanes, and one table.
struct OneGroup {
  static constexpr int groups(int) { return 1; }
  static constexpr int kTables = 1;
  // 2^bits levels repeated over 64 bytes, so that a lookup may ignore the high bits of its index.
  static void fill_tables(const std::int8_t* levels, int bits, int bias, std::uint8_t* table) {
    for (int i = 0; i < 64; ++i) table[i] = static_cast<std::uint8_t>(levels[i & ((1 << bits) - 1)] + bias);
  }
};

template <class Simd, int Bits, int Quads, class Visit>
KVF_INLINE void walk(const std::uint8_t* src, int part, const Visit& visit) {
  const auto ahead = [src, part](int line) KVF_INLINE_LAMBDA {
    if (part == 0) Simd::prefetch_codes(src + 64 * line);
  };
  const std::uint8_t* mine = src + part * Simd::kBytes;
  if constexpr (Bits == 3) {
    constexpr int kLow = Quads / 4, kHigh = Quads / 8;
    for (int s = 0; s < kHigh; ++s) {
      const auto high = Simd::load_codes(mine + 64 * (kLow + s));
      const auto even = Simd::load_codes(mine + 64 * s), odd = Simd::load_codes(mine + 64 * (s + kHigh));
      for (int line : {s, s + kHigh, s + kLow}) ahead(line);
      if constexpr (Simd::kMergesPairs) {
        unroll<4>([&](auto field) KVF_INLINE_LAMBDA {
          constexpr int f = decltype(field)::value;
          const auto pair = Simd::template merge<2 * (f / 2), f>(f % 2 == 0 ? even : odd, high);
          visit(s + f * kHigh, pair);
          visit(s + (f + 4) * kHigh, Simd::template shift<4>(pair));
        });
      } else {
        unroll<8>([&](auto field) KVF_INLINE_LAMBDA {
          constexpr int f = decltype(field)::value;
          visit(s + f * kHigh, Simd::template merge<2 * (f / 2), f>(f % 2 == 0 ? even : odd, high));
        });
      }
    }
  } else if constexpr (Bits >= kLevelBits) {
    for (int s = 0; s < Quads; ++s) visit(s, Simd::load_codes(mine + 64 * s));
  } else {
    constexpr int kLines = Quads * Bits / 8;
    for (int s = 0; s < kLines; ++s) {
      const auto raw = Simd::load_codes(mine + 64 * s);
      ahead(s);
      unroll<8 / Bits>([&](auto field) KVF_INLINE_LAMBDA {
        constexpr int f = decltype(field)::value;
        visit(s + f * kLines, Simd::template shift<f * Bits>(raw));
      });
    }
  }
}

}  // namespace
}  // namespace kvfold
#endif
