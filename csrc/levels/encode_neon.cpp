// Trellis encoding, eight vectors at a time.
#include "simd_neon.h"
#include "trellis_fold.h"

namespace kvfold {
namespace {

struct NeonLanes {
  static constexpr int kLanes = 8;
  static constexpr bool kScarceLoads = false;
  using Reg = uint16x8_t;
  static Reg load(const std::uint16_t* p) { return vld1q_u16(p); }
  static void store(std::uint16_t* p, Reg a) { vst1q_u16(p, a); }
  static void store_bytes(std::uint8_t* p, Reg a) { vst1q_u8(p, vreinterpretq_u8_u16(a)); }
  static Reg set(std::uint16_t x) { return vdupq_n_u16(x); }
  static Reg add(Reg a, Reg b) { return vqaddq_u16(a, b); }
  static Reg subtract(Reg a, Reg b) { return vsubq_u16(a, b); }
  static Reg min(Reg a, Reg b) { return vminq_u16(a, b); }
  static Reg distance(Reg a, Reg b) {
    return vreinterpretq_u16_s16(vabdq_s16(vreinterpretq_s16_u16(a), vreinterpretq_s16_u16(b)));
  }
  static Reg multiply(Reg a, Reg b) { return vmulq_u16(a, b); }
  static Reg shift(Reg a, int n) { return vshlq_u16(a, vdupq_n_s16(static_cast<std::int16_t>(-n))); }
  template <int kBits>
  static Reg shift_left(Reg a) {
    return vshlq_n_u16(a, kBits);
  }
  template <int kBits>
  static Reg shift_right(Reg a) {
    return vshrq_n_u16(a, kBits);
  }
  static Reg bit_and(Reg a, Reg b) { return vandq_u16(a, b); }
  static Reg bit_or(Reg a, Reg b) { return vorrq_u16(a, b); }
  static Reg and_not(Reg a, Reg b) { return vbicq_u16(a, b); }
  static Reg where_less(Reg a, Reg b, Reg yes, Reg no) { return vbslq_u16(vcltq_u16(a, b), yes, no); }
};

}  // namespace
const TrellisEncoder kEncodeNeon = {NeonLanes::kLanes, search_task<NeonLanes>, fold_trellis<SimdNeon, NeonLanes>};
}  // namespace kvfold
