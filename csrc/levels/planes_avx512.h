// The walk of planes.h for vpermb, which reads six bits of an index. Codes stay where their bytes have them: a table that repeats its
// levels wherever only bits of other codes differ takes the place of a shift and a mask. Two groups of lanes may be walked side by side.
#ifndef KVFOLD_PLANES_AVX512_H
#define KVFOLD_PLANES_AVX512_H

#include <immintrin.h>

#include <cstdint>
#include <type_traits>

#include "level.h"
#include "unroll.h"

namespace kvfold {
namespace {

// What levels with this walk look levels up in: a table for every place where a byte may have a code, bits but the third of a 3-bit code
// from `low` on, that one at `high`. Codes of other widths than 2 and 3 have one place.
struct PlacedTables {
  static constexpr int kTables = 6;
  struct Place {
    int low, high;
  };
  static constexpr Place kOf2[] = {{0, 0}, {2, 0}, {4, 0}};
  static constexpr Place kOf3[] = {{0, 2}, {0, 3}, {2, 4}, {2, 5}, {4, 2}, {4, 3}};

  static void fill_tables(const std::int8_t* levels, int bits, int bias, std::uint8_t* tables) {
    for (int t = 0; t < (bits == 2 ? 3 : bits == 3 ? 6 : 1); ++t)
      for (int i = 0; i < 64; ++i) {
        int code = i & ((1 << bits) - 1);
        if (bits == 2) code = i >> kOf2[t].low & 3;
        if (bits == 3) code = (i >> kOf3[t].low & 3) | (i >> kOf3[t].high & 1) << 2;
        tables[64 * t + i] = static_cast<std::uint8_t>(levels[code] + bias);
      }
  }
};

template <int N>
constexpr std::integral_constant<int, N> constant{};

// Lines of Span groups.
template <int Span>
struct Lines {
  __m512i of[Span];

  template <class F>
  static KVF_INLINE Lines each(const F& f) {
    Lines out;
    unroll<Span>([&](auto i) KVF_INLINE_LAMBDA { out.of[i] = f(i); });
    return out;
  }
};

// Calls visit(quad, indices, table) for each quad of Span groups, whose first lines are at src and which lie as format.h has them;
// `table` is a constant. ask(line) is called for each line of packed codes, in the order of addresses: hardware prefetchers follow
// what it prefetches, at the pace of the walk.
template <int Bits, int Quads, int Span, class Ask, class Visit>
KVF_INLINE void walk_groups(const std::uint8_t* src, const Ask& ask, const Visit& visit) {
  using L = Lines<Span>;
  [[maybe_unused]] constexpr bool kPacked = Bits < kLevelBits;
  [[maybe_unused]] constexpr int kGroup = 8 * Quads * width_of(Bits);
  // turn: how many calls came before.
  [[maybe_unused]] const auto load = [=](int line, int turn) KVF_INLINE_LAMBDA {
    return L::each([&](auto i) KVF_INLINE_LAMBDA {
      if constexpr (kPacked) ask(src + 64 * (Span * turn + i));
      return _mm512_loadu_si512(src + i * kGroup + 64 * line);
    });
  };
  [[maybe_unused]] const auto right = [](const L& a, auto by) KVF_INLINE_LAMBDA {
    return L::each([&](auto i) KVF_INLINE_LAMBDA { return _mm512_srli_epi16(a.of[i], by); });
  };
  if constexpr (Bits == 3) {
    constexpr int kLow = Quads / 4, kHigh = Quads / 8, kSelect = 0xCA;  // first ? second : third
    const auto merge = [](int mask, const L& low, const L& high) KVF_INLINE_LAMBDA {
      return L::each([&](auto i) KVF_INLINE_LAMBDA {
        return _mm512_ternarylogic_epi64(_mm512_set1_epi8(static_cast<char>(mask)), low.of[i], high.of[i], kSelect);
      });
    };
    for (int s = 0; s < kHigh; ++s) {
      const L high = load(kLow + s, 3 * s), even = load(s, 3 * s + 1), odd = load(s + kHigh, 3 * s + 2);
      const L up = L::each([&](auto i) KVF_INLINE_LAMBDA { return _mm512_slli_epi16(high.of[i], 2); });
      visit(s, merge(0x03, even, up), constant<0>);
      visit(s + kHigh, merge(0x03, odd, up), constant<1>);
      visit(s + 2 * kHigh, merge(0x0C, even, up), constant<2>);
      visit(s + 3 * kHigh, merge(0x0C, odd, up), constant<3>);
      const L down = right(high, constant<2>);
      visit(s + 4 * kHigh, merge(0x30, even, down), constant<4>);
      visit(s + 5 * kHigh, merge(0x30, odd, down), constant<5>);
      visit(s + 6 * kHigh, merge(0x0C, right(even, constant<4>), down), constant<2>);
      visit(s + 7 * kHigh, merge(0x0C, right(odd, constant<4>), down), constant<3>);
    }
  } else if constexpr (Bits == 2) {
    constexpr int kLines = Quads / 4;
    for (int s = 0; s < kLines; ++s) {
      const L raw = load(s, s);
      visit(s, raw, constant<0>);
      visit(s + kLines, raw, constant<1>);
      visit(s + 2 * kLines, raw, constant<2>);
      visit(s + 3 * kLines, right(raw, constant<4>), constant<1>);
    }
  } else if constexpr (Bits == 4) {
    constexpr int kLines = Quads / 2;
    for (int s = 0; s < kLines; ++s) {
      const L raw = load(s, s);
      visit(s, raw, constant<0>);
      visit(s + kLines, right(raw, constant<4>), constant<0>);
    }
  } else {
    for (int s = 0; s < Quads; ++s) visit(s, load(s, s), constant<0>);
  }
}

}  // namespace
}  // namespace kvfold
#endif
