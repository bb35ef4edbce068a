// Trellis encoding, thirty-two vectors at a time.
#include <immintrin.h>

#include "simd_avx512.h"
#include "trellis_fold.h"

namespace kvfold {
namespace {

struct Avx512Lanes {
  static constexpr int kLanes = 32;
  static constexpr bool kScarceLoads = true;
  using Reg = __m512i;
  static Reg load(const std::uint16_t* p) { return _mm512_loadu_si512(p); }
  static void store(std::uint16_t* p, Reg a) { _mm512_store_si512(p, a); }
  static void store_bytes(std::uint8_t* p, Reg a) { _mm512_store_si512(p, a); }
  static Reg set(std::uint16_t x) { return _mm512_set1_epi16(static_cast<short>(x)); }
  static Reg add(Reg a, Reg b) { return _mm512_adds_epu16(a, b); }
  static Reg subtract(Reg a, Reg b) { return _mm512_sub_epi16(a, b); }
  static Reg min(Reg a, Reg b) { return _mm512_min_epu16(a, b); }
  static Reg distance(Reg a, Reg b) { return _mm512_abs_epi16(_mm512_sub_epi16(a, b)); }
  static Reg multiply(Reg a, Reg b) { return _mm512_mullo_epi16(a, b); }
  static Reg shift(Reg a, int n) { return _mm512_srl_epi16(a, _mm_cvtsi32_si128(n)); }
  template <int kBits>
  static Reg shift_left(Reg a) {
    return _mm512_slli_epi16(a, kBits);
  }
  template <int kBits>
  static Reg shift_right(Reg a) {
    return _mm512_srli_epi16(a, kBits);
  }
  static Reg bit_and(Reg a, Reg b) { return _mm512_and_si512(a, b); }
  static Reg bit_or(Reg a, Reg b) { return _mm512_or_si512(a, b); }
  static Reg and_not(Reg a, Reg b) { return _mm512_andnot_si512(b, a); }
  static Reg where_less(Reg a, Reg b, Reg yes, Reg no) { return _mm512_mask_mov_epi16(no, _mm512_cmplt_epu16_mask(a, b), yes); }
};

}  // namespace
const TrellisEncoder kEncodeAvx512 = {Avx512Lanes::kLanes, search_task<Avx512Lanes>, fold_trellis<SimdAvx512, Avx512Lanes>};
}  // namespace kvfold
