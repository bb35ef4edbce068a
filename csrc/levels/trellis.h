// Levels of one head's side of a page in trellis codes, unpacked to bytes in the order that dot products read:
//   keys:   [group of 16 tokens][quad of coordinates][16 tokens][4 coordinates]
//   values: [group of 16 coordinates][quad of tokens][16 coordinates][4 tokens]
// Coordinates come in the order of place_in_trellis. `bias` is added to every level. A reader may leave indices of levels instead: its
// kIndices then says so, and key_bits() and value_bits() which (level.h), value_groups() how many groups of values share lines.
//
// This is the reading by tables, which any processor can do: about as many instructions as values. trellis_avx512.h and
// trellis_planes.h have those for many tokens at once.
#ifndef KVFOLD_LEVELS_TRELLIS_H
#define KVFOLD_LEVELS_TRELLIS_H

#include <cstdint>
#include <cstring>

#include "../half.h"
#include "../streams.h"
#include "level.h"

namespace kvfold {
namespace {

// The order in which attention reads the coordinates of a trellis side: 0 2 4 6 1 3 5 7 of each eight, so that four that follow each
// other have the same width. place(j) is where coordinate j comes.
inline int place_in_trellis(int j) { return (j & ~7) | (j & 1) << 2 | (j & 6) >> 1; }

// The bits of an index that bit `bit` of a window sets.
inline unsigned index_column(const kvf_trellis_reader& code, int phase, int bit) {
  const std::uint64_t matrix = bit < 8 ? code.affine_low[phase] : code.affine_high[phase];
  unsigned column = 0;
  for (int i = 0; i < 8; ++i) column |= static_cast<unsigned>(matrix >> (8 * (7 - i) + bit % 8) & 1) << i;
  return column;
}

// What readers of levels have in common.
struct LevelsReader {
  static constexpr bool kIndices = false;
  static int key_bits(const kvf_trellis_reader&) { return kLevelBits; }
  static int value_bits(const kvf_trellis_reader&) { return kLevelBits; }
  static int place(const kvf_trellis_reader&, int j) { return place_in_trellis(j); }
};

template <class Simd>
struct TrellisReader : LevelsReader {
  TrellisReader(const kvf_trellis_reader& c, int d, int b) : code(c), dim(d), bias(b) {}

  void keys(const std::uint8_t* codes, const std::uint8_t* headers, std::uint8_t* out) const {
    for (int t = 0; t < kPageTokens; ++t) {
      std::uint8_t* lane = out + t / kLanes * kLanes * dim + t % kLanes * 4;
      read_levels(codes, dim, code, t, headers[t], [&](int j, std::int8_t level) {
        const int at = place_in_trellis(j);
        lane[at / 4 * 64 + at % 4] = static_cast<std::uint8_t>(level + bias);
      });
    }
  }

  void values(const std::uint8_t* codes, const std::uint8_t* headers, std::uint8_t* out) const {
    for (int t = 0; t < kPageTokens; ++t) {
      std::uint8_t* quad = out + t / 4 * 64 + t % 4;
      read_levels(codes, dim, code, t, headers[t], [&](int j, std::int8_t level) {
        const int at = place_in_trellis(j);
        quad[at / kLanes * kTokenQuads * 64 + at % kLanes * 4] = static_cast<std::uint8_t>(level + bias);
      });
    }
  }

  const kvf_trellis_reader& code;
  const int dim, bias;
};

// Scales of a page's tokens, float [128].
inline void trellis_scales(const std::uint8_t* headers, const std::uint8_t* unit_bytes, float* out) {
  std::uint16_t half;
  std::memcpy(&half, unit_bytes, sizeof half);
  const float unit = half_to_float(half);
  for (int t = 0; t < kPageTokens; ++t) out[t] = unit * static_cast<float>(headers[t] & kScaleCode);
}

}  // namespace
}  // namespace kvfold
#endif
