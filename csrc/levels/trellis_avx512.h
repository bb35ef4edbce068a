// Trellis codes with AVX-512 VBMI, VBMI2 and GFNI: sixteen tokens at a time, no table of windows.
//
// A register holds 32 bits of sixteen streams. One funnel shift brings the bits of four steps of equal width together, one multishift
// cuts their windows to bytes, one affine instruction is the GF(2)-linear map from window to index (two for windows of more than
// eight bits), one permutation looks up the level: 4 to 7 instructions for 64 values.
#ifndef KVFOLD_TRELLIS_AVX512_H
#define KVFOLD_TRELLIS_AVX512_H

#include <immintrin.h>

#include "simd_avx512.h"
#include "trellis.h"
#include "unroll.h"

namespace kvfold {
namespace {

// Bytes i of every four are the eight bits at `first` + i * `step`.
inline __m512i window_control(int first, int step) {
  std::uint64_t control = 0;
  for (int i = 0; i < 8; ++i) control |= static_cast<std::uint64_t>(first + i % 4 * step + i / 4 * 32) << (8 * i);
  return _mm512_set1_epi64(static_cast<long long>(control));
}

template <>
struct TrellisReader<SimdAvx512> {
  TrellisReader(const kvf_trellis_reader& c, int d, int bias) : code(c), dim(d) {
    const int step = c.widths[0] + c.widths[1];
    low_control = window_control(0, step);
    high_control = window_control(8, step);
    for (int i = 0; i < 2; ++i) {
      low[i] = _mm512_set1_epi64(static_cast<long long>(c.affine_low[i]));
      high[i] = _mm512_set1_epi64(static_cast<long long>(c.affine_high[i]));
    }
    table = _mm512_add_epi8(_mm512_loadu_si512(c.levels), _mm512_set1_epi8(static_cast<char>(bias)));
    std::uint32_t words[16] = {};
    for (int i = 0; i < 4; ++i) words[i] = std::uint32_t{c.starts[i]} << (32 - kHistory);
    starts = _mm512_loadu_si512(words);
  }

  void keys(const std::uint8_t* codes, const std::uint8_t* headers, std::uint8_t* out) const {
    const int group_bytes = kLanes * dim;
    read(codes, headers, [out, group_bytes](int group, int quad, const __m512i* levels) {
      std::uint8_t* to = out + group * group_bytes + quad * 64;
      for (int i = 0; i < 4; ++i) _mm512_store_si512(to + 64 * i, levels[i]);
    });
  }

  void values(const std::uint8_t* codes, const std::uint8_t* headers, std::uint8_t* out) const {
    const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    read(codes, headers, [out, order](int group, int quad, const __m512i* levels) {
      // 128 bits are four tokens of one quad: gather those of the same tokens, then turn 4 x 4 bytes.
      const __m512i a = _mm512_shuffle_i32x4(levels[0], levels[1], 0x44), b = _mm512_shuffle_i32x4(levels[0], levels[1], 0xEE);
      const __m512i c = _mm512_shuffle_i32x4(levels[2], levels[3], 0x44), d = _mm512_shuffle_i32x4(levels[2], levels[3], 0xEE);
      std::uint8_t* to = out + (quad / 4 * kTokenQuads + group * 4) * 64;
      _mm512_store_si512(to, _mm512_shuffle_epi8(_mm512_shuffle_i32x4(a, c, 0x88), order));
      _mm512_store_si512(to + 64, _mm512_shuffle_epi8(_mm512_shuffle_i32x4(a, c, 0xDD), order));
      _mm512_store_si512(to + 128, _mm512_shuffle_epi8(_mm512_shuffle_i32x4(b, d, 0x88), order));
      _mm512_store_si512(to + 192, _mm512_shuffle_epi8(_mm512_shuffle_i32x4(b, d, 0xDD), order));
    });
  }

 private:
  // Calls sink(group of 16 tokens, first of four quads, their levels). Sinks travel by value, and what a loop needs is copied: its stores
  // could change anything else for all the compiler knows.
  template <class Sink>
  void read(const std::uint8_t* codes, const std::uint8_t* headers, Sink sink) const {
    switch (code.widths[0] * 8 + code.widths[1]) {
      case 1 * 8 + 1: return read_groups<1, 1>(codes, headers, sink);
      case 1 * 8 + 2: return read_groups<1, 2>(codes, headers, sink);
      case 2 * 8 + 2: return read_groups<2, 2>(codes, headers, sink);
      case 2 * 8 + 3: return read_groups<2, 3>(codes, headers, sink);
      case 3 * 8 + 3: return read_groups<3, 3>(codes, headers, sink);
      default: return read_groups<3, 4>(codes, headers, sink);
    }
  }

  template <int Even, int Odd, class Sink>
  void read_groups(const std::uint8_t* codes, const std::uint8_t* headers, Sink sink) const {
    constexpr int kLines = Even + Odd;  // of 64 coordinates
    const Maps maps{{low[0], low[1]}, {high[0], high[1]}, low_control, high_control, table};
    const int quads = dim / 4;
    for (int group = 0; group < kTokenGroups; ++group) {
      const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(headers + group * kLanes)));
      __m512i before = _mm512_permutexvar_epi32(_mm512_srli_epi32(bytes, 6), starts);
      for (int first = 0; first < quads; first += 16) {
        __m512i lines[kLines + 2];
        lines[0] = before;
        for (int n = 0; n < kLines; ++n) {
          SimdAvx512::prefetch_codes(codes);
          lines[n + 1] = SimdAvx512::load_codes(codes);
          codes += 64;
        }
        lines[kLines + 1] = before = lines[kLines];
        unroll<4>([&](auto part) {
          __m512i levels[4];
          unroll<4>([&](auto index) {
            levels[decltype(index)::value] = quad<Even, Odd, decltype(part)::value * 4 + decltype(index)::value>(lines, maps);
          });
          sink(group, first + decltype(part)::value * 4, levels);
        });
      }
    }
  }

  struct Maps {
    __m512i low[2], high[2], low_control, high_control, table;
  };

  // Levels of quad Quad of 64 coordinates: even ones of eight, then the odd ones. lines[0] ends with the bits before.
  template <int Even, int Odd, int Quad>
  static __m512i quad(const __m512i* lines, const Maps& maps) {
    constexpr int kPhase = Quad % 2, kWindow = kHistory + (kPhase == 0 ? Even : Odd);
    constexpr int kBit = 32 - kHistory + Quad / 2 * 4 * (Even + Odd) + kPhase * Even, kLine = kBit / 32, kShift = kBit % 32;
    static_assert(3 * (Even + Odd) + kWindow <= 32, "four windows fit a word");
    const __m512i bits = kShift == 0 ? lines[kLine] : _mm512_shrdi_epi32(lines[kLine], lines[kLine + 1], kShift);
    __m512i index = _mm512_gf2p8affine_epi64_epi8(_mm512_multishift_epi64_epi8(maps.low_control, bits), maps.low[kPhase], 0);
    if constexpr (kWindow > 8) {
      const __m512i rest = _mm512_gf2p8affine_epi64_epi8(_mm512_multishift_epi64_epi8(maps.high_control, bits), maps.high[kPhase], 0);
      index = _mm512_xor_si512(index, rest);
    }
    return _mm512_permutexvar_epi8(index, maps.table);
  }

  const kvf_trellis_reader& code;
  const int dim;
  __m512i low_control, high_control, low[2], high[2], table, starts;
};

}  // namespace
}  // namespace kvfold
#endif
