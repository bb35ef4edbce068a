// Trellis codes of a page: symbols [128][D] <-> the engine's streams, and the scalar reading of levels. format.h has the picture.
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

// Bits of a level's index, at least four.
inline int trellis_index_bits(const kvf_trellis_reader& code) {
  const std::uint64_t masks = code.affine_low[0] | code.affine_low[1] | code.affine_high[0] | code.affine_high[1];
  int bits = 6;
  while (bits > 4 && (masks >> (8 * (8 - bits)) & 255) == 0) --bits;
  return bits;
}

constexpr int kSegment = 16;                          // coordinates
constexpr int kMaxStream = kMaxDim / kSegment * 8;    // bytes
inline int segment_bytes(const kvf_trellis_reader& code) { return code.widths[0] + code.widths[1]; }

// Where the bytes of streams lie in the codes of one side: byte c of a segment at first(token) + offset(segment, c).
class StreamOrder {
 public:
  StreamOrder(const kvf_trellis_reader& code, int dim, bool of_keys)
      : bytes(segment_bytes(code)), segments(dim / kSegment), keys(of_keys), quads(kLanes / segments) {}

  int first(int token) const {
    if (keys) return 64 * (token / kLanes * (segments / 4) * bytes) + 4 * (token % kLanes);
    return 64 * (token / (4 * quads) * bytes) + 4 * (token / 4 % quads) + token % 4;
  }
  int offset(int segment, int c) const { return keys ? 64 * (segment / 4 * bytes + c) + segment % 4 : 64 * c + 4 * quads * segment; }

  void load(const std::uint8_t* codes, int token, std::uint8_t* stream) const {
    codes += first(token);
    for (int s = 0; s < segments; ++s)
      for (int c = 0; c < bytes; ++c) *stream++ = codes[offset(s, c)];
  }
  void store(const std::uint8_t* stream, int token, std::uint8_t* codes) const {
    codes += first(token);
    for (int s = 0; s < segments; ++s)
      for (int c = 0; c < bytes; ++c) codes[offset(s, c)] = *stream++;
  }

  const int bytes, segments;

 private:
  const bool keys;
  const int quads;
};

// The order in which attention has the coordinates of a side, on all levels. Of a trellis side, a group of 16 lanes of values is the
// coordinates that are as far into their segments, of as many segments as there are; if those are fewer, neighbours of them too, as
// shuffles within 128 bits bring them together.
inline int place(const kvf_format& format, bool keys, int j) {
  if ((keys ? format.key : format.value).trellis == nullptr) return j;
  const int segment = j / kSegment, window = j % kSegment, quads = kMaxDim / format.head_dim, run = 4 / quads;
  if (keys) return segment / 4 * 64 + 4 * window + segment % 4;
  return window / quads * kLanes + segment / run * 4 + window % quads * run + segment % run;
}

inline void pack_streams(const std::uint8_t* symbols, int dim, const kvf_trellis_reader& code, bool keys, std::uint8_t* out) {
  const StreamOrder order(code, dim, keys);
  for (int t = 0; t < kPageTokens; ++t, symbols += dim) {
    std::uint8_t stream[kMaxStream];
    unsigned bits = 0;
    int held = 0, n = 0;
    for (int j = 0; j < dim; ++j) {
      const int width = code.widths[j % 2];
      bits |= entering(symbols[j], width) << held;
      held += width;
      if (held < 8) continue;
      stream[n++] = static_cast<std::uint8_t>(bits);
      bits >>= 8;
      held -= 8;
    }
    order.store(stream, t, out);
  }
}

inline void unpack_streams(const std::uint8_t* in, int dim, const kvf_trellis_reader& code, bool keys, std::uint8_t* symbols) {
  const StreamOrder order(code, dim, keys);
  for (int t = 0; t < kPageTokens; ++t, symbols += dim) {
    std::uint8_t stream[kMaxStream];
    order.load(in, t, stream);
    unsigned bits = 0;
    int held = 0, n = 0;
    for (int j = 0; j < dim; ++j) {
      const int width = code.widths[j % 2];
      if (held < width) {
        bits |= unsigned{stream[n++]} << held;
        held += 8;
      }
      symbols[j] = static_cast<std::uint8_t>(entering(bits & ((1u << width) - 1u), width));
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
inline void read_levels(const std::uint8_t* in, int dim, const kvf_trellis_reader& code, bool keys, int token, std::uint8_t header,
                        const Visit& visit) {
  std::uint8_t stream[kMaxStream];
  StreamOrder(code, dim, keys).load(in, token, stream);
  const int step = code.widths[0] + code.widths[1], need = kHistory + step;
  const std::uint64_t mask = (std::uint64_t{1} << need) - 1;
  std::uint64_t bits = code.starts[header >> 6];
  int held = kHistory;
  const std::uint8_t* next = stream;
  for (int j = 0; j < dim; j += 2) {
    if (held < need) {
      bits |= std::uint64_t{load_word(next)} << held;
      next += 4;
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
