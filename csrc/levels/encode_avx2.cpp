// Trellis encoding, sixteen vectors at a time.
#include <immintrin.h>

#include "simd_avx2.h"
#include "trellis_fold.h"

namespace kvfold {
namespace {

struct Avx2Lanes {
  static constexpr int kLanes = 16;
  static constexpr bool kScarceLoads = false;
  using Reg = __m256i;
  static Reg load(const std::uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store(std::uint16_t* p, Reg a) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), a); }
  static void store_bytes(std::uint8_t* p, Reg a) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), a); }
  static Reg set(std::uint16_t x) { return _mm256_set1_epi16(static_cast<short>(x)); }
  static Reg add(Reg a, Reg b) { return _mm256_adds_epu16(a, b); }
  static Reg subtract(Reg a, Reg b) { return _mm256_sub_epi16(a, b); }
  static Reg min(Reg a, Reg b) { return _mm256_min_epu16(a, b); }
  static Reg distance(Reg a, Reg b) { return _mm256_abs_epi16(_mm256_sub_epi16(a, b)); }
  static Reg multiply(Reg a, Reg b) { return _mm256_mullo_epi16(a, b); }
  static Reg shift(Reg a, int n) { return _mm256_srl_epi16(a, _mm_cvtsi32_si128(n)); }
  template <int kBits>
  static Reg shift_left(Reg a) {
    return _mm256_slli_epi16(a, kBits);
  }
  template <int kBits>
  static Reg shift_right(Reg a) {
    return _mm256_srli_epi16(a, kBits);
  }
  static Reg bit_and(Reg a, Reg b) { return _mm256_and_si256(a, b); }
  static Reg bit_or(Reg a, Reg b) { return _mm256_or_si256(a, b); }
  static Reg and_not(Reg a, Reg b) { return _mm256_andnot_si256(b, a); }
  static Reg where_less(Reg a, Reg b, Reg yes, Reg no) {
    return _mm256_blendv_epi8(yes, no, _mm256_cmpeq_epi16(_mm256_max_epu16(a, b), a));
  }
};

}  // namespace
const TrellisEncoder kEncodeAvx2 = {Avx2Lanes::kLanes, search_task<Avx2Lanes>, fold_trellis<SimdAvx2<Avx2Dot>, Avx2Lanes>};
}  // namespace kvfold
