// Trellis codes of a page: symbols [128][D] <-> the engine's word streams, and the scalar reading of levels. format.h has the picture.
#ifndef KVFOLD_STREAMS_H
#define KVFOLD_STREAMS_H

#include <cstdint>
#include <cstring>

#include "format.h"
#include "pack.h"

namespace kvfold {
namespace {

constexpr int kHistory = 6;  // bits of the register before a step
constexpr std::uint8_t kScaleCode = 63;
constexpr float kFullScale = 50;  // the page's longest vector in its unit

// The first bit of a symbol to enter the register is its highest.
inline unsigned entering(unsigned symbol, int width) {
  constexpr std::uint8_t kReversed[16] = {0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15};
  return unsigned{kReversed[symbol]} >> (4 - width);
}

inline std::size_t stream_words(const kvf_trellis_reader& code, int dim) {
  return static_cast<std::size_t>(dim) / 64 * static_cast<std::size_t>(code.widths[0] + code.widths[1]);
}

// Bits of a level's index, by the bits of two symbols.
constexpr int index_bits(int pair) { return pair <= 4 ? 4 : pair == 5 ? 5 : 6; }
inline int trellis_index_bits(const kvf_trellis_reader& code) { return index_bits(code.widths[0] + code.widths[1]); }

// Where word n of a token's stream lies.
inline std::size_t word_offset(std::size_t words, int token, std::size_t n) {
  return (static_cast<std::size_t>(token / kLanes) * words + n) * 64 + 4 * static_cast<std::size_t>(token % kLanes);
}

inline void pack_streams(const std::uint8_t* symbols, int dim, const kvf_trellis_reader& code, std::uint8_t* out) {
  const std::size_t words = stream_words(code, dim);
  for (int t = 0; t < kPageTokens; ++t, symbols += dim) {
    std::uint64_t bits = 0;
    int held = 0;
    std::size_t n = 0;
    for (int j = 0; j < dim; ++j) {
      const int width = code.widths[j % 2];
      bits |= std::uint64_t{entering(symbols[j], width)} << held;
      held += width;
      if (held < 32) continue;
      const auto word = static_cast<std::uint32_t>(bits);
      std::memcpy(out + word_offset(words, t, n++), &word, sizeof word);
      bits >>= 32;
      held -= 32;
    }
  }
}

inline void unpack_streams(const std::uint8_t* in, int dim, const kvf_trellis_reader& code, std::uint8_t* symbols) {
  const std::size_t words = stream_words(code, dim);
  for (int t = 0; t < kPageTokens; ++t, symbols += dim) {
    std::uint64_t bits = 0;
    int held = 0;
    std::size_t n = 0;
    for (int j = 0; j < dim; ++j) {
      const int width = code.widths[j % 2];
      if (held < width) {
        bits |= std::uint64_t{load_word(in + word_offset(words, t, n++))} << held;
        held += 32;
      }
      symbols[j] = static_cast<std::uint8_t>(entering(static_cast<unsigned>(bits) & ((1u << width) - 1u), width));
      bits >>= width;
      held -= width;
    }
  }
}

// Symbols of even and odd coordinates as the canonical page holds them: one field, or one for each if their widths differ.
template <class Visit>
inline void for_fields(const kvf_trellis_reader& code, int dim, const Visit& visit) {
  const int period = code.widths[0] == code.widths[1] ? 1 : 2;
  for (int phase = 0; phase < period; ++phase) visit(phase, period, dim / period, code.widths[phase]);
}

inline void pack_canonical_symbols(const std::uint8_t* symbols, int dim, const kvf_trellis_reader& code, std::uint8_t* out) {
  for_fields(code, dim, [&](int phase, int period, int count, int width) {
    std::uint8_t field[kPageTokens * kMaxDim];
    for (int i = 0; i < kPageTokens * count; ++i) field[i] = symbols[i * period + phase];
    pack_canonical(field, count, width, out);
    out += std::size_t{16} * count * width;
  });
}

inline void unpack_canonical_symbols(const std::uint8_t* in, int dim, const kvf_trellis_reader& code, std::uint8_t* symbols) {
  for_fields(code, dim, [&](int phase, int period, int count, int width) {
    std::uint8_t field[kPageTokens * kMaxDim];
    unpack_canonical(in, count, width, field);
    for (int i = 0; i < kPageTokens * count; ++i) symbols[i * period + phase] = field[i];
    in += std::size_t{16} * count * width;
  });
}

// Visits (coordinate, level) of one token by look-up of two levels at a time.
template <class Visit>
inline void read_levels(const std::uint8_t* in, int dim, const kvf_trellis_reader& code, int token, std::uint8_t header, const Visit& visit) {
  const std::size_t words = stream_words(code, dim);
  const int step = code.widths[0] + code.widths[1], need = kHistory + step;
  const std::uint64_t mask = (std::uint64_t{1} << need) - 1;
  std::uint64_t bits = code.starts[header >> 6];
  int held = kHistory;
  std::size_t n = 0;
  for (int j = 0; j < dim; j += 2) {
    if (held < need) {
      bits |= std::uint64_t{load_word(in + word_offset(words, token, n++))} << held;
      held += 32;
    }
    const std::int8_t* pair = code.pairs + 2 * (bits & mask);
    visit(j, pair[0]);
    visit(j + 1, pair[1]);
    bits >>= step;
    held -= step;
  }
}

}  // namespace
}  // namespace kvfold
#endif
