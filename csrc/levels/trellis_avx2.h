// Trellis codes with AVX2: 32 tokens at a time, see trellis_planes.h.
//
// Planes hold tokens so that each 32 bits are four that follow each other; the quads of the lower 128 bits are 0 2 4 6, those of the
// upper 1 3 5 7. A shuffle answers zero where bit 7 of its index is set, which selects between two tables of sixteen: an index has
// its fifth bit there. Of 64 levels the lower half mirrors the upper: an index is then the place in one half and a sign in bit 6.
#ifndef KVFOLD_TRELLIS_AVX2_H
#define KVFOLD_TRELLIS_AVX2_H

#include <immintrin.h>

#include "simd_avx2.h"
#include "trellis_planes.h"

namespace kvfold {
namespace {

struct PlanesAvx2 {
  static constexpr int kTokens = 32;
  using Reg = __m256i;

  // The form in which Lookup takes an index of that many bits. It is affine over bits.
  static std::uint8_t form(unsigned index, int bits) {
    if (bits == 6) {
      const unsigned upper = index >> 5, place = (index ^ (upper != 0 ? 31 : 0)) & 31;
      return static_cast<std::uint8_t>((place & 15) | (place >> 4) << 7 | (upper ^ 1) << 6 | 1 << 5);
    }
    return static_cast<std::uint8_t>((index & 15) | (index >> 4) << 7);
  }

  struct Lookup {
    Lookup(const std::int8_t* all, int bits, int b) : bias(_mm256_set1_epi8(static_cast<char>(b))) {
      std::uint8_t bytes[2][16];
      for (int i = 0; i < 32; ++i)
        bytes[i / 16][i % 16] = static_cast<std::uint8_t>(bits == 6 ? all[32 + (i ^ 31)] : all[i] + b);
      for (int i = 0; i < 2; ++i) table[i] = broadcast(bytes[i]);
    }

    template <int Bits>
    Reg levels(Reg index) const {
      const Reg low = _mm256_shuffle_epi8(table[0], index);
      if constexpr (Bits <= 4) return low;
      const Reg high = _mm256_shuffle_epi8(table[1], _mm256_xor_si256(index, _mm256_set1_epi8(static_cast<char>(0x80))));
      const Reg both = _mm256_or_si256(low, high);
      if constexpr (Bits == 5) return both;
      // Doubled, the index has its sign in bit 7, and bit 6 so that it is never zero.
      return _mm256_add_epi8(bias, _mm256_sign_epi8(both, _mm256_add_epi8(index, index)));
    }

    Reg table[2], bias;
  };

  static Reg find(const std::uint8_t* table, Reg nibble) { return _mm256_shuffle_epi8(broadcast(table), nibble); }
  static Reg exclusive_or(Reg a, Reg b) { return _mm256_xor_si256(a, b); }

  static void split(Reg bytes, Reg* nibbles) {
    const Reg low = _mm256_set1_epi8(15);
    nibbles[0] = _mm256_and_si256(bytes, low);
    nibbles[1] = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low);
  }

  // The byte before a stream: its start state.
  static Reg starts(const std::uint8_t* headers, const std::uint8_t* table) {
    const Reg order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    const Reg bytes = _mm256_permutevar8x32_epi32(load_256(headers), order);
    return find(table, _mm256_and_si256(_mm256_srli_epi16(bytes, 6), _mm256_set1_epi8(3)));
  }

  // One line of two groups -> the four bytes of its words.
  static void load(const std::uint8_t* line, std::size_t group, Reg* planes) {
    SimdAvx2<Avx2Dot>::prefetch_codes(line);
    SimdAvx2<Avx2Dot>::prefetch_codes(line + group);
    const Reg order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const Reg words[4] = {
        _mm256_shuffle_epi8(load_256(line), order),
        _mm256_shuffle_epi8(load_256(line + 32), order),
        _mm256_shuffle_epi8(load_256(line + group), order),
        _mm256_shuffle_epi8(load_256(line + group + 32), order),
    };
    turn(words, planes);
  }

  // Four coordinates -> a line of keys of two groups.
  static void store_keys(const Reg* four, std::uint8_t* out, std::size_t group) {
    const Reg a = _mm256_unpacklo_epi8(four[0], four[1]), b = _mm256_unpacklo_epi8(four[2], four[3]);
    const Reg c = _mm256_unpackhi_epi8(four[0], four[1]), d = _mm256_unpackhi_epi8(four[2], four[3]);
    store_256(out, _mm256_unpacklo_epi16(a, b));
    store_256(out + 32, _mm256_unpackhi_epi16(a, b));
    store_256(out + group, _mm256_unpacklo_epi16(c, d));
    store_256(out + group + 32, _mm256_unpackhi_epi16(c, d));
  }

  // Four coordinates -> a quarter of eight lines of values.
  static void store_values(const Reg* four, std::uint8_t* out) {
    Reg quads[4];
    turn(four, quads);
    for (int i = 0; i < 4; ++i) {
      _mm_store_si128(reinterpret_cast<__m128i*>(out + 128 * i), _mm256_castsi256_si128(quads[i]));
      _mm_store_si128(reinterpret_cast<__m128i*>(out + 128 * i + 64), _mm256_extracti128_si256(quads[i], 1));
    }
  }

 private:
  // Transposes 4 x 4 words of 32 bits in either half.
  static void turn(const Reg* in, Reg* out) {
    const Reg a = _mm256_unpacklo_epi32(in[0], in[1]), b = _mm256_unpacklo_epi32(in[2], in[3]);
    const Reg c = _mm256_unpackhi_epi32(in[0], in[1]), d = _mm256_unpackhi_epi32(in[2], in[3]);
    out[0] = _mm256_unpacklo_epi64(a, b);
    out[1] = _mm256_unpackhi_epi64(a, b);
    out[2] = _mm256_unpacklo_epi64(c, d);
    out[3] = _mm256_unpackhi_epi64(c, d);
  }
  static Reg broadcast(const std::uint8_t* bytes) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  }
  static Reg load_256(const std::uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store_256(std::uint8_t* p, Reg a) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), a); }
};

template <class Dot>
struct TrellisReader<SimdAvx2<Dot>> : PlanesReader<PlanesAvx2> {
  using PlanesReader::PlanesReader;
};

}  // namespace
}  // namespace kvfold
#endif
