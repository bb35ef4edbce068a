// Trellis codes read a run of lines at a time (format.h): bytes that are equally far into their segments lie in one line, so every window of 16
// begins at the same bit of each byte of the same line. A reader maps the windows of a register of bytes to levels, or their indices, for all
// segments in it at once. What it finds is a line of keys as it is, and of values but for shuffles within 128 bits.
//
// `Reader` derives from RunsReader and has: kBytes of a register; load() and store(); find(table of 16, indices); top_two(bytes), the two
// highest bits of each; evens(a, b) and odds(a, b), words 0 2 or 1 3 of both in every 128 bits; and run(lines, before, sink), which calls
// sink(part, n, four) for windows 4n to 4n + 3 of every register of bytes.
#ifndef KVFOLD_TRELLIS_RUNS_H
#define KVFOLD_TRELLIS_RUNS_H

#include <cstdint>
#include <cstring>

#include "trellis.h"
#include "unroll.h"

namespace kvfold {
namespace {

template <class Reader>
class RunsReader {
 public:
  RunsReader(const kvf_trellis_reader& c, int d) : code(c), dim(d), run_bytes(64 * segment_bytes(c)) {
    for (int i = 0; i < 16; ++i) starts[i] = static_cast<std::uint8_t>(c.starts[i % 4] << (8 - kHistory));
  }

  void keys(const std::uint8_t* codes, const std::uint8_t* headers, std::uint8_t* out) const {
    alignas(64) std::uint8_t first[kPageTokens], before[64];
    find_starts(headers, first);
    for (int group = 0; group < kTokenGroups; ++group)
      for (int block = 0; block < dim / 64; ++block, codes += run_bytes, out += kSegment * 64) {
        const std::uint8_t* last = codes + run_bytes - 64;
        for (int t = 0; t < kLanes; ++t) {  // of the segment before it, three of which are in the same word
          const std::uint32_t earlier = block == 0 ? first[group * kLanes + t] : last[4 * t + 3 - run_bytes];
          const std::uint32_t word = load_word(last + 4 * t) << 8 | earlier;
          std::memcpy(before + 4 * t, &word, sizeof word);
        }
        self().run(codes, before, [out](int part, int n, const auto* four) KVF_INLINE_LAMBDA {
          for (int i = 0; i < 4; ++i) Reader::store(out + 64 * (4 * n + i) + part * Reader::kBytes, four[i]);
        });
      }
  }

  void values(const std::uint8_t* codes, const std::uint8_t* headers, std::uint8_t* out) const {
    if (dim == 64) return values_of<4>(codes, headers, out);
    dim == 128 ? values_of<2>(codes, headers, out) : values_of<1>(codes, headers, out);
  }

 protected:
  // The byte before each stream: its start state.
  void find_starts(const std::uint8_t* headers, std::uint8_t* out) const {
    for (int t = 0; t < kPageTokens; t += Reader::kBytes)
      Reader::store(out + t, Reader::find(starts, Reader::top_two(Reader::load(headers + t))));
  }

  const kvf_trellis_reader& code;
  const int dim, run_bytes;
  alignas(16) std::uint8_t starts[16];

 private:
  const Reader& self() const { return static_cast<const Reader&>(*this); }

  // Quads of tokens to a run.
  template <int Quads>
  void values_of(const std::uint8_t* codes, const std::uint8_t* headers, std::uint8_t* out) const {
    alignas(64) std::uint8_t first[kPageTokens], before[64];
    find_starts(headers, first);
    for (int quad = 0; quad < kTokenQuads; quad += Quads, codes += run_bytes) {
      std::memcpy(before, first + 4 * quad, 4 * Quads);
      std::memcpy(before + 4 * Quads, codes + run_bytes - 64, 64 - 4 * Quads);
      std::uint8_t* lines = out + 64 * quad;
      self().run(codes, before, [lines](int part, int n, const auto* four) KVF_INLINE_LAMBDA {
        constexpr int kGroup = 64 * kTokenQuads;
        std::uint8_t* line = lines + part * Reader::kBytes + 4 / Quads * n * kGroup;
        const auto put = [line](int group, int q, auto levels) KVF_INLINE_LAMBDA { Reader::store(line + group * kGroup + 64 * q, levels); };
        if constexpr (Quads == 1) {
          for (int i = 0; i < 4; ++i) put(i, 0, four[i]);
        } else {
          const auto ab = Reader::evens(four[0], four[1]), ab_odd = Reader::odds(four[0], four[1]);
          const auto cd = Reader::evens(four[2], four[3]), cd_odd = Reader::odds(four[2], four[3]);
          if constexpr (Quads == 2) {
            put(0, 0, ab);
            put(0, 1, ab_odd);
            put(1, 0, cd);
            put(1, 1, cd_odd);
          } else {
            put(0, 0, Reader::evens(ab, cd));
            put(0, 1, Reader::evens(ab_odd, cd_odd));
            put(0, 2, Reader::odds(ab, cd));
            put(0, 3, Reader::odds(ab_odd, cd_odd));
          }
        }
      });
    }
  }
};

}  // namespace
}  // namespace kvfold
#endif
