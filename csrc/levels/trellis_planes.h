// Trellis codes by byte shuffles: byte k of the streams of many tokens in one register, for levels without AVX-512.
//
// The map from window to index is linear over bits, so the index of a window is the exclusive or of what its nibbles contribute, each
// looked up in a table of sixteen. Where a window begins in its first nibble repeats every few steps and is the same for all tokens:
// every step of 16 coordinates, which take a whole number of bytes, has tables of its own. A step is two to four look-ups for all
// tokens of a register, then the level's look-up.
//
// `Planes` supplies the registers: kTokens bytes, how a code line becomes four planes and four planes of levels a line, and in what
// form it takes an index.
#ifndef KVFOLD_TRELLIS_PLANES_H
#define KVFOLD_TRELLIS_PLANES_H

#include <cstddef>
#include <cstdint>

#include "trellis.h"
#include "unroll.h"

namespace kvfold {
namespace {

constexpr int kNibble = 4;

template <class Planes>
class PlanesReader : public LevelsReader {
  using Reg = typename Planes::Reg;

 public:
  PlanesReader(const kvf_trellis_reader& c, int d, int bias) : code(c), dim(d), levels(c.levels, trellis_index_bits(c), bias) {
    for (int phase = 0; phase < 2; ++phase)
      for (int offset = 0; offset < kNibble; ++offset) fill(phase, offset);
    for (int i = 0; i < 16; ++i) starts[i] = static_cast<std::uint8_t>(c.starts[i % 4] << (8 - kHistory));
  }

  void keys(const std::uint8_t* codes, const std::uint8_t* headers, std::uint8_t* out) const {
    const std::size_t group = std::size_t{kLanes} * dim;
    read(codes, headers, [out, group](int token, int at, const Reg* four) {
      Planes::store_keys(four, out + token / kLanes * group + at / 4 * 64, group);
    });
  }

  void values(const std::uint8_t* codes, const std::uint8_t* headers, std::uint8_t* out) const {
    read(codes, headers, [out](int token, int at, const Reg* four) {
      Planes::store_values(four, out + (at / kLanes * kTokenQuads + token / 4) * 64 + at % kLanes * 4);
    });
  }

 private:
  // What the nibbles of a window that begins `offset` bits into the first contribute. What an index's form adds to zero is the first's.
  void fill(int phase, int offset) {
    const int window = kHistory + code.widths[phase], bits = trellis_index_bits(code);
    const std::uint8_t zero = Planes::form(0, bits);
    for (int n = 0; n < kNibbles; ++n) {
      std::uint8_t* table = nibbles[phase][offset][n];
      for (int value = 0; value < 16; ++value) {
        unsigned index = 0;
        for (int i = 0; i < kNibble; ++i) {
          const int bit = n * kNibble + i - offset;
          if ((value >> i & 1) != 0 && bit >= 0 && bit < window) index ^= index_column(code, phase, bit);
        }
        table[value] = static_cast<std::uint8_t>(Planes::form(index, bits) ^ (n == 0 ? 0 : zero));
      }
    }
  }

  // Calls sink(first token, place of the first of four coordinates, their levels). Sinks travel by value: see trellis_avx512.h.
  template <class Sink>
  void read(const std::uint8_t* codes, const std::uint8_t* headers, Sink sink) const {
    switch (code.widths[0] * 8 + code.widths[1]) {
      case 1 * 8 + 1: return read_tokens<1, 1>(codes, headers, sink);
      case 1 * 8 + 2: return read_tokens<1, 2>(codes, headers, sink);
      case 2 * 8 + 2: return read_tokens<2, 2>(codes, headers, sink);
      case 2 * 8 + 3: return read_tokens<2, 3>(codes, headers, sink);
      case 3 * 8 + 3: return read_tokens<3, 3>(codes, headers, sink);
      default: return read_tokens<3, 4>(codes, headers, sink);
    }
  }

  template <int Even, int Odd, class Sink>
  void read_tokens(const std::uint8_t* codes, const std::uint8_t* headers, Sink sink) const {
    constexpr int kLines = Even + Odd;  // of 64 coordinates; and bytes of 16
    const std::size_t group = stream_words(code, dim) * 64;
    const auto lookup = levels;
    for (int token = 0; token < kPageTokens; token += Planes::kTokens) {
      const std::uint8_t* line = codes + token / kLanes * group;
      Reg before = Planes::starts(headers + token, starts);
      for (int first = 0; first < dim; first += 64) {
        Reg bytes[4 * kLines];
        for (int n = 0; n < kLines; ++n, line += 64) Planes::load(line, group, bytes + 4 * n);
        for (int sixteen = 0; sixteen < 4; ++sixteen) {
          const Reg* chunk = bytes + sixteen * kLines;
          read_chunk<Even, Odd>(before, chunk, lookup, [&](int at, const Reg* four) { sink(token, first + sixteen * 16 + at, four); });
          before = chunk[kLines - 1];
        }
      }
    }
  }

  // Levels of 16 coordinates. `before` ends with the bits that come before `bytes`.
  template <int Even, int Odd, class Lookup, class Sink>
  void read_chunk(Reg before, const Reg* bytes, const Lookup& lookup, const Sink& sink) const {
    constexpr int kBytes = Even + Odd;
    Reg nibble[2 * kBytes + 2];
    Planes::split(before, nibble);
    for (int i = 0; i < kBytes; ++i) Planes::split(bytes[i], nibble + 2 + 2 * i);
    unroll<4>([&](auto quad) {
      constexpr int kQuad = decltype(quad)::value, kPhase = kQuad % 2, kWindow = kHistory + (kPhase == 0 ? Even : Odd);
      Reg four[4];
      unroll<4>([&](auto member) {
        constexpr int kPair = kQuad / 2 * 4 + decltype(member)::value;
        constexpr int kBit = 8 - kHistory + kPair * (Even + Odd) + kPhase * Even, kFirst = kBit / kNibble, kOffset = kBit % kNibble;
        constexpr int kCount = (kOffset + kWindow + kNibble - 1) / kNibble;
        static_assert(kCount <= kNibbles, "a window's nibbles have tables");
        Reg index = Planes::find(nibbles[kPhase][kOffset][0], nibble[kFirst]);
        unroll<kCount - 1>([&](auto rest) {
          constexpr int n = decltype(rest)::value + 1;
          index = Planes::exclusive_or(index, Planes::find(nibbles[kPhase][kOffset][n], nibble[kFirst + n]));
        });
        four[decltype(member)::value] = lookup.template levels<index_bits(Even + Odd)>(index);
      });
      sink(kQuad * 4, four);
    });
  }

  static constexpr int kNibbles = 4;  // at most, of a window
  const kvf_trellis_reader& code;
  const int dim;
  const typename Planes::Lookup levels;
  alignas(16) std::uint8_t starts[16];
  alignas(16) std::uint8_t nibbles[2][kNibble][kNibbles][16];
};

}  // namespace
}  // namespace kvfold
#endif
