// Trellis codes by byte shuffles, for levels without AVX-512.
//
// The map from window to index is linear over bits, so the index of a window is the exclusive or of what its nibbles contribute, each
// looked up in a table of sixteen. Where a window begins in its first nibble repeats every few steps and is the same for all segments.
// A step is two to four look-ups for all bytes of a register, then the level's look-up.
//
// `Planes` supplies the registers, and in what form levels are looked up by an index.
#ifndef KVFOLD_TRELLIS_PLANES_H
#define KVFOLD_TRELLIS_PLANES_H

#include <cstdint>

#include "trellis_runs.h"

namespace kvfold {
namespace {

constexpr int kNibble = 4;

template <class Planes>
class PlanesReader : public Planes, public RunsReader<PlanesReader<Planes>> {
  using Runs = RunsReader<PlanesReader<Planes>>;
  using Reg = typename Planes::Reg;

 public:
  static constexpr int kUnpacked = kLevelBits, kStreamRows = 0;

  PlanesReader(const kvf_format& f, bool keys, int bias)
      : Runs(keys ? *f.key.trellis : *f.value.trellis, f.head_dim), bits(trellis_index_bits(Runs::code)), levels(Runs::code.levels, bits, bias) {
    for (int phase = 0; phase < 2; ++phase)
      for (int offset = 0; offset < kNibble; ++offset) fill(phase, offset);
  }

  template <class Sink>
  void run(const std::uint8_t* lines, const std::uint8_t* before, Sink sink) const {
    switch (Runs::code.widths[0] * 8 + Runs::code.widths[1]) {
      case 1 * 8 + 1: return read<1, 1>(lines, before, sink);
      case 1 * 8 + 2: return read<1, 2>(lines, before, sink);
      case 2 * 8 + 2: return read<2, 2>(lines, before, sink);
      case 2 * 8 + 3: return read<2, 3>(lines, before, sink);
      case 3 * 8 + 3: return read<3, 3>(lines, before, sink);
      default: return read<3, 4>(lines, before, sink);
    }
  }

 private:
  // What the nibbles of a window that begins `offset` bits into the first contribute. What an index's form adds to zero is the first's.
  void fill(int phase, int offset) {
    const int window = kHistory + Runs::code.widths[phase];
    const std::uint8_t zero = Planes::form(0, bits);
    for (int n = 0; n < kNibbles; ++n) {
      std::uint8_t* table = nibbles[phase][offset][n];
      for (int value = 0; value < 16; ++value) {
        unsigned index = 0;
        for (int i = 0; i < kNibble; ++i) {
          const int bit = n * kNibble + i - offset;
          if ((value >> i & 1) != 0 && bit >= 0 && bit < window) index ^= index_column(Runs::code, phase, bit);
        }
        table[value] = static_cast<std::uint8_t>(Planes::form(index, bits) ^ (n == 0 ? 0 : zero));
      }
    }
  }

  template <int Even, int Odd, class Sink>
  void read(const std::uint8_t* lines, const std::uint8_t* before, const Sink& sink) const {
    constexpr int kPair = Even + Odd;
    const auto lookup = levels;
    for (int part = 0; part < 64 / Planes::kBytes; ++part) {
      Reg nibble[2 * kPair + 2];
      Planes::split(Planes::load(before + part * Planes::kBytes), nibble);
      for (int i = 0; i < kPair; ++i) {
        const std::uint8_t* line = lines + 64 * i + part * Planes::kBytes;
        if (part == 0) Planes::prefetch_codes(line);
        Planes::split(Planes::load(line), nibble + 2 + 2 * i);
      }
      unroll<4>([&](auto n) {
        Reg four[4];
        unroll<4>([&](auto member) {
          constexpr int kWindow = decltype(n)::value * 4 + decltype(member)::value, kPhase = kWindow % 2;
          constexpr int kBit = 8 - kHistory + kWindow / 2 * kPair + kPhase * Even, kFirst = kBit / kNibble, kOffset = kBit % kNibble;
          constexpr int kCount = (kOffset + kHistory + (kPhase == 0 ? Even : Odd) + kNibble - 1) / kNibble;
          static_assert(kCount <= kNibbles, "a window's nibbles have tables");
          Reg index = Planes::find(nibbles[kPhase][kOffset][0], nibble[kFirst]);
          unroll<kCount - 1>([&](auto rest) {
            constexpr int i = decltype(rest)::value + 1;
            index = Planes::exclusive_or(index, Planes::find(nibbles[kPhase][kOffset][i], nibble[kFirst + i]));
          });
          four[decltype(member)::value] = index;
        });
        lookup.levels(four, bits);
        sink(part, decltype(n)::value, four);
      });
    }
  }

  static constexpr int kNibbles = 4;  // at most, of a window
  const int bits;
  const typename Planes::Lookup levels;
  alignas(16) std::uint8_t nibbles[2][kNibble][kNibbles][16];
};

}  // namespace
}  // namespace kvfold
#endif
