// Levels of one head's side of a page in trellis codes, unpacked to bytes in the order that dot products read:
//   keys:   [group of 16 tokens][quad of coordinates][16 tokens][4 coordinates]
//   values: [group of 16 coordinates][quad of tokens][16 coordinates][4 tokens]
// Coordinates come in the order of place(). `bias` is added to every level. A reader may leave indices of levels instead, if its
// kUnpacked says so.
//
// This is the reading by tables, which any processor can do: about as many instructions as values. trellis_runs.h has the reading of whole
// lines.
#ifndef KVFOLD_LEVELS_TRELLIS_H
#define KVFOLD_LEVELS_TRELLIS_H

#include <cstdint>
#include <cstring>

#include "../half.h"
#include "../streams.h"
#include "level.h"

namespace kvfold {
namespace {

// The bits of an index that bit `bit` of a window sets.
inline unsigned index_column(const kvf_trellis_reader& code, int phase, int bit) {
  const std::uint64_t matrix = bit < 8 ? code.affine_low[phase] : code.affine_high[phase];
  unsigned column = 0;
  for (int i = 0; i < 8; ++i) column |= static_cast<unsigned>(matrix >> (8 * (7 - i) + bit % 8) & 1) << i;
  return column;
}

template <class Simd>
struct TrellisReader {
  static constexpr int kUnpacked = kLevelBits;
  static constexpr int kStreamRows = 0;  // query rows whose products a reader makes itself, without unpacking; see trellis_avx512.h

  TrellisReader(const kvf_format& f, bool keys, int b) : format(f), code(keys ? *f.key.trellis : *f.value.trellis), bias(b) {}

  void keys(const std::uint8_t* codes, const std::uint8_t* headers, std::uint8_t* out) const {
    const int dim = format.head_dim;
    for (int t = 0; t < kPageTokens; ++t) {
      std::uint8_t* lane = out + t / kLanes * kLanes * dim + t % kLanes * 4;
      read_levels(codes, dim, code, true, t, headers[t], [&](int j, std::int8_t level) {
        const int at = place(format, true, j);
        lane[at / 4 * 64 + at % 4] = static_cast<std::uint8_t>(level + bias);
      });
    }
  }

  void values(const std::uint8_t* codes, const std::uint8_t* headers, std::uint8_t* out) const {
    for (int t = 0; t < kPageTokens; ++t) {
      std::uint8_t* quad = out + t / 4 * 64 + t % 4;
      read_levels(codes, format.head_dim, code, false, t, headers[t], [&](int j, std::int8_t level) {
        const int at = place(format, false, j);
        quad[at / kLanes * kTokenQuads * 64 + at % kLanes * 4] = static_cast<std::uint8_t>(level + bias);
      });
    }
  }

  const kvf_format& format;
  const kvf_trellis_reader& code;
  const int bias;
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
