// Trellis codes with AVX-512 VBMI, VBMI2 and GFNI: sixteen tokens at a time, no table of windows.
//
// A register holds four bytes of sixteen streams, those of four coordinates 16 apart: byte c + i * S of 64 coordinates, where a pair of
// coordinates takes S bits. A window begins at the same bit of each and ends one byte on, rarely two, and the map from window to index is
// linear over bits: an index is one matrix times the first byte exclusive or another times the next (gf2p8affineqb). Where indices have
// four bits, two windows share a byte and its matrices. What is left for the dot product is the look-up of the level, on execution ports that
// it does not need: it takes indices (level.h).
#ifndef KVFOLD_TRELLIS_AVX512_H
#define KVFOLD_TRELLIS_AVX512_H

#include <immintrin.h>

#include "simd_avx512.h"
#include "trellis.h"
#include "unroll.h"

namespace kvfold {
namespace {

template <>
class TrellisReader<SimdAvx512> {
  using Reg = __m512i;

 public:
  static constexpr bool kIndices = true;
  static bool paired(const kvf_trellis_reader& code) { return trellis_index_bits(code) == 4; }
  static int key_bits(const kvf_trellis_reader& code) { return paired(code) ? kPairBits : kIndexBits; }
  static int value_bits(const kvf_trellis_reader& code) { return paired(code) ? kLowHalfBits : kIndexBits; }
  // Coordinate j of 64 is byte j / 16 of window j % 16. Two windows of a byte are four quads of keys, or a group of values, apart.
  static int place(const kvf_trellis_reader& code, int j) {
    const int window = j % 16, quad = paired(code) ? window / 8 * 8 + window % 2 * 4 + window % 8 / 2 : window;
    return j / 64 * 64 + 4 * quad + j % 64 / 16;
  }

  TrellisReader(const kvf_trellis_reader& c, int d, int) : code(c), dim(d) {
    for (int window = 0; window < 16; ++window)
      paired(code) ? add_maps(window, maps[window / 2], window / 2 * 2, window % 2 * 4) : add_maps(window, maps[window], window, 0);
    std::uint32_t words[16] = {};
    for (int i = 0; i < 4; ++i) words[i] = std::uint32_t{c.starts[i]} << (32 - kHistory);
    starts = _mm512_loadu_si512(words);
  }

  void keys(const std::uint8_t* codes, const std::uint8_t* headers, std::uint8_t* out) const {
    const int blocks = dim / 64;
    read(codes, headers, [out, blocks](auto sizes, int group, int block, const Reg* bytes, const Maps* to) KVF_INLINE_LAMBDA {
      using S = decltype(sizes);
      std::uint8_t* line = out + (group * blocks + block) * S::kOut * 64;
      unroll<S::kOut>([&](auto n) KVF_INLINE_LAMBDA {
        _mm512_store_si512(line + 64 * n, indices<S, decltype(n)::value>(bytes, to));
      });
    });
  }

  // Lanes become coordinates, and the four bytes of a lane tokens.
  void values(const std::uint8_t* codes, const std::uint8_t* headers, std::uint8_t* out) const {
    const Reg order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    read(codes, headers, [out, order](auto sizes, int group, int block, const Reg* bytes, const Maps* to) KVF_INLINE_LAMBDA {
      using S = decltype(sizes);
      Reg turned[S::kBytes];
      unroll<S::kBytes>([&](auto i) KVF_INLINE_LAMBDA { turned[i] = _mm512_shuffle_epi8(bytes[i], order); });
      std::uint8_t* line = out + (block * (S::kOut / 4) * kTokenQuads + group * 4) * 64;
      unroll<S::kOut / 4>([&](auto four) KVF_INLINE_LAMBDA {
        constexpr int n = 4 * decltype(four)::value;
        const Reg i0 = indices<S, n>(turned, to), i1 = indices<S, n + 1>(turned, to);
        const Reg i2 = indices<S, n + 2>(turned, to), i3 = indices<S, n + 3>(turned, to);
        // 128 bits are four tokens: gather those of the same.
        const Reg a = _mm512_shuffle_i32x4(i0, i1, 0x44), b = _mm512_shuffle_i32x4(i0, i1, 0xEE);
        const Reg c = _mm512_shuffle_i32x4(i2, i3, 0x44), d = _mm512_shuffle_i32x4(i2, i3, 0xEE);
        std::uint8_t* quad = line + n / 4 * kTokenQuads * 64;
        _mm512_store_si512(quad, _mm512_shuffle_i32x4(a, c, 0x88));
        _mm512_store_si512(quad + 64, _mm512_shuffle_i32x4(a, c, 0xDD));
        _mm512_store_si512(quad + 128, _mm512_shuffle_i32x4(b, d, 0x88));
        _mm512_store_si512(quad + 192, _mm512_shuffle_i32x4(b, d, 0xDD));
      });
    });
  }

 private:
  static constexpr int kMaps = 3;  // bytes that a window, or two, can touch
  using Maps = std::uint64_t[kMaps];

  // Windows begin with their history: bytes[0] is the one before the block's first.
  static constexpr int first_bit(int window, int pair, int even) { return 8 - kHistory + window / 2 * pair + window % 2 * even; }

  template <int Even, int Odd>
  struct Sizes {
    static constexpr int kPair = Even + Odd, kEven = Even, kBytes = kPair + 1, kOut = index_bits(kPair) == 4 ? 8 : 16;
    static constexpr int kWindows = 16 / kOut;  // to a byte of indices
    static constexpr int first(int n) { return first_bit(n * kWindows, kPair, Even) / 8; }
    static constexpr int count(int n) {
      const int last = first_bit(n * kWindows + kWindows - 1, kPair, Even) + kHistory + (kWindows == 2 || n % 2 != 0 ? Odd : Even) - 1;
      return last / 8 - first(n) + 1;
    }
  };

  // The map of one window into bits `shift` and up of an index, of bytes counted from the one where window `from` begins.
  void add_maps(int window, Maps& to, int from, int shift) const {
    const int pair = code.widths[0] + code.widths[1], even = code.widths[0];
    const int first = first_bit(window, pair, even), byte = first_bit(from, pair, even) / 8;
    for (int bit = 0; bit < kHistory + code.widths[window % 2]; ++bit) {
      const unsigned column = index_column(code, window % 2, bit) << shift;
      const int at = first + bit;
      for (int i = 0; i < 8; ++i) to[at / 8 - byte] |= std::uint64_t{column >> i & 1} << (8 * (7 - i) + at % 8);
    }
  }

  template <class Sizes, int N>
  static KVF_INLINE Reg indices(const Reg* bytes, const Maps* to) {
    constexpr int first = Sizes::first(N), count = Sizes::count(N);
    static_assert(count <= kMaps && first + count <= Sizes::kBytes, "the block's bytes");
    const auto part = [&](int i) KVF_INLINE_LAMBDA {
      return _mm512_gf2p8affine_epi64_epi8(bytes[first + i], _mm512_set1_epi64(static_cast<long long>(to[N][i])), 0);
    };
    if constexpr (count == 1) return part(0);
    if constexpr (count == 2) return _mm512_xor_si512(part(0), part(1));
    constexpr int kExclusiveOr = 0x96;
    return _mm512_ternarylogic_epi64(part(0), part(1), part(2), kExclusiveOr);
  }

  // Calls sink(sizes, group, block, bytes, maps) for every group of 16 tokens and block of 64 coordinates. Sinks
  // travel by value, and what a loop needs is copied: its stores could change anything else for all the compiler knows.
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
    using S = Sizes<Even, Odd>;
    Maps copy[S::kOut];
    std::memcpy(copy, maps, sizeof copy);
    const int blocks = dim / 64;
    for (int group = 0; group < kTokenGroups; ++group) {
      const Reg stored = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(headers + group * kLanes)));
      Reg before = _mm512_permutexvar_epi32(_mm512_srli_epi32(stored, 6), starts);
      for (int block = 0; block < blocks; ++block) {
        Reg lines[S::kPair], bytes[S::kBytes];
        unroll<S::kPair>([&](auto n) KVF_INLINE_LAMBDA {
          SimdAvx512::prefetch_codes(codes + 64 * n);
          lines[n] = SimdAvx512::load_codes(codes + 64 * n);
        });
        codes += 64 * S::kPair;
        unroll<S::kPair>([&](auto c) KVF_INLINE_LAMBDA { bytes[c + 1] = gather<S::kPair, decltype(c)::value>(lines); });
        bytes[0] = _mm512_shldi_epi32(bytes[S::kPair], before, 8);
        before = lines[S::kPair - 1];
        sink(S{}, group, block, bytes, copy);
      }
    }
  }

  // Byte B0 of every word of one register, B1 of another; B2 and B3 likewise.
  struct ControlBytes {
    constexpr ControlBytes(int b0, int b1, int b2, int b3) : bytes() {
      const int wanted[4] = {b0, 64 + b1, b2, 64 + b3};
      for (int i = 0; i < 64; ++i) bytes[i] = static_cast<std::uint8_t>(i / 4 * 4 + wanted[i % 4]);
    }
    alignas(64) std::uint8_t bytes[64];
  };
  template <int B0, int B1, int B2, int B3>
  struct Control {
    static constexpr ControlBytes kOf{B0, B1, B2, B3};
  };

  // Bytes Byte + i * Stride of the streams in `lines`, i = 0 to 3.
  template <int Stride, int Byte>
  static KVF_INLINE Reg gather(const Reg* lines) {
    constexpr int b0 = Byte, b1 = Byte + Stride, b2 = Byte + 2 * Stride, b3 = Byte + 3 * Stride;
    const Reg control = _mm512_load_si512(Control<b0 % 4, b1 % 4, b2 % 4, b3 % 4>::kOf.bytes);
    const Reg low = _mm512_permutex2var_epi8(lines[b0 / 4], control, lines[b1 / 4]);
    const Reg high = _mm512_permutex2var_epi8(lines[b2 / 4], control, lines[b3 / 4]);
    return _mm512_mask_blend_epi16(0xAAAAAAAAu, low, high);
  }

  const kvf_trellis_reader& code;
  const int dim;
  Reg starts;
  Maps maps[16] = {};
};

}  // namespace
}  // namespace kvfold
#endif
