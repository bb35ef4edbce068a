// Trellis codes with AVX2: half a line at a time, see trellis_planes.h.
//
// A shuffle answers zero where bit 7 of its index is set, which selects between two tables of sixteen: an index has
// its fifth bit there. Of 64 levels the lower half mirrors the upper: an index is then the place in one half and a sign in bit 6.
#ifndef KVFOLD_TRELLIS_AVX2_H
#define KVFOLD_TRELLIS_AVX2_H

#include <immintrin.h>

#include "simd_avx2.h"
#include "trellis_planes.h"

namespace kvfold {
namespace {

struct PlanesAvx2 {
  static constexpr int kBytes = 32;
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

    // Four registers of indices -> levels.
    KVF_INLINE void levels(Reg* four, int bits) const {
      if (bits == 4) return unroll<4>([&](auto i) KVF_INLINE_LAMBDA { four[i] = _mm256_shuffle_epi8(table[0], four[i]); });
      if (bits == 5) return unroll<4>([&](auto i) KVF_INLINE_LAMBDA { four[i] = of_32(four[i]); });
      // Doubled, the index has its sign in bit 7, and bit 6 so that it is never zero.
      unroll<4>([&](auto i) KVF_INLINE_LAMBDA {
        four[i] = _mm256_add_epi8(bias, _mm256_sign_epi8(of_32(four[i]), _mm256_add_epi8(four[i], four[i])));
      });
    }
    KVF_INLINE Reg of_32(Reg index) const {
      const Reg other = _mm256_xor_si256(index, _mm256_set1_epi8(static_cast<char>(0x80)));
      return _mm256_or_si256(_mm256_shuffle_epi8(table[0], index), _mm256_shuffle_epi8(table[1], other));
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

  static Reg top_two(Reg bytes) { return _mm256_and_si256(_mm256_srli_epi16(bytes, 6), _mm256_set1_epi8(3)); }

  // Words 0 2, and 1 3, of both in every 128 bits.
  static Reg evens(Reg a, Reg b) { return pick<0x88>(a, b); }
  static Reg odds(Reg a, Reg b) { return pick<0xDD>(a, b); }

  static Reg load(const std::uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store(std::uint8_t* p, Reg a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
  static KVF_INLINE void prefetch_codes(const std::uint8_t* p) { SimdAvx2<Avx2Dot>::prefetch_codes(p); }

 private:
  template <int Words>
  static Reg pick(Reg a, Reg b) {
    return _mm256_castps_si256(_mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), Words));
  }
  static Reg broadcast(const std::uint8_t* bytes) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  }
};

template <class Dot>
struct TrellisReader<SimdAvx2<Dot>> : PlanesReader<PlanesAvx2> {
  using PlanesReader::PlanesReader;
};

}  // namespace
}  // namespace kvfold
#endif
