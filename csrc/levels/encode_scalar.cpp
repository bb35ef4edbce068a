// Trellis encoding in plain C++: eight lanes that a compiler may put into whatever registers there are.
#include "simd_scalar.h"
#include "trellis_fold.h"

namespace kvfold {
namespace {

// Compilers put neither a saturating sum nor a choice into vectors unasked, even where every processor of the kind has them: 20 times slower.
struct Lanes {
  static constexpr int kLanes = 8;
  static constexpr bool kScarceLoads = false;
#if defined(__GNUC__)
  typedef std::uint16_t Reg __attribute__((vector_size(16)));
  typedef std::int16_t Signed __attribute__((vector_size(16)));
  static Reg load(const std::uint16_t* p) {
    Reg a;
    std::memcpy(&a, p, sizeof a);
    return a;
  }
  static void store(std::uint16_t* p, Reg a) { std::memcpy(p, &a, sizeof a); }
  static void store_bytes(std::uint8_t* p, Reg a) { std::memcpy(p, &a, sizeof a); }
  static Reg set(std::uint16_t x) { return Reg{} + x; }
  static Reg less(Reg a, Reg b) { return reinterpret_cast<Reg>(a < b); }  // all ones where it is
  static Reg add(Reg a, Reg b) {
    const Reg sum = a + b;
    return sum | less(sum, a);
  }
  static Reg subtract(Reg a, Reg b) { return a - b; }
  static Reg min(Reg a, Reg b) { return where_less(a, b, a, b); }
  static Reg distance(Reg a, Reg b) {
    const Signed d = reinterpret_cast<Signed>(a) - reinterpret_cast<Signed>(b), sign = d >> 15;
    return reinterpret_cast<Reg>((d ^ sign) - sign);
  }
  static Reg multiply(Reg a, Reg b) { return a * b; }
  static Reg shift(Reg a, int n) { return a >> static_cast<std::uint16_t>(n); }
  template <int kBits>
  static Reg shift_left(Reg a) {
    return a << kBits;
  }
  template <int kBits>
  static Reg shift_right(Reg a) {
    return a >> kBits;
  }
  static Reg bit_and(Reg a, Reg b) { return a & b; }
  static Reg bit_or(Reg a, Reg b) { return a | b; }
  static Reg and_not(Reg a, Reg b) { return a & ~b; }
  static Reg where_less(Reg a, Reg b, Reg yes, Reg no) { return no ^ ((no ^ yes) & less(a, b)); }
#else
  struct Reg {
    std::uint16_t v[kLanes];
  };
  template <class F>
  static Reg each(F f) {
    Reg out;
    for (int i = 0; i < kLanes; ++i) out.v[i] = static_cast<std::uint16_t>(f(i));
    return out;
  }
  static Reg load(const std::uint16_t* p) {
    return each([=](int i) { return p[i]; });
  }
  static void store(std::uint16_t* p, const Reg& a) {
    for (int i = 0; i < kLanes; ++i) p[i] = a.v[i];
  }
  static void store_bytes(std::uint8_t* p, const Reg& a) {
    for (int i = 0; i < kLanes; ++i) {
      p[2 * i] = static_cast<std::uint8_t>(a.v[i]);
      p[2 * i + 1] = static_cast<std::uint8_t>(a.v[i] >> 8);
    }
  }
  static Reg set(std::uint16_t x) {
    return each([=](int) { return x; });
  }
  static Reg add(const Reg& a, const Reg& b) {  // saturating
    return each([&](int i) { return a.v[i] + b.v[i] > 65535 ? 65535 : a.v[i] + b.v[i]; });
  }
  static Reg subtract(const Reg& a, const Reg& b) {
    return each([&](int i) { return a.v[i] - b.v[i]; });
  }
  static Reg min(const Reg& a, const Reg& b) {
    return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }
  static Reg distance(const Reg& a, const Reg& b) {  // of signed numbers
    return each([&](int i) {
      const int d = static_cast<std::int16_t>(a.v[i]) - static_cast<std::int16_t>(b.v[i]);
      return d < 0 ? -d : d;
    });
  }
  static Reg multiply(const Reg& a, const Reg& b) {
    return each([&](int i) { return static_cast<unsigned>(a.v[i]) * b.v[i]; });
  }
  static Reg shift(const Reg& a, int n) {
    return each([&](int i) { return a.v[i] >> n; });
  }
  template <int kBits>
  static Reg shift_left(const Reg& a) {
    return each([&](int i) { return a.v[i] << kBits; });
  }
  template <int kBits>
  static Reg shift_right(const Reg& a) {
    return each([&](int i) { return a.v[i] >> kBits; });
  }
  static Reg bit_and(const Reg& a, const Reg& b) {
    return each([&](int i) { return a.v[i] & b.v[i]; });
  }
  static Reg bit_or(const Reg& a, const Reg& b) {
    return each([&](int i) { return a.v[i] | b.v[i]; });
  }
  static Reg and_not(const Reg& a, const Reg& b) {
    return each([&](int i) { return a.v[i] & ~b.v[i]; });
  }
  static Reg where_less(const Reg& a, const Reg& b, const Reg& yes, const Reg& no) {
    return each([&](int i) { return a.v[i] < b.v[i] ? yes.v[i] : no.v[i]; });
  }
#endif
};

}  // namespace
const TrellisEncoder kEncodeScalar = {Lanes::kLanes, search_task<Lanes>, fold_trellis<SimdScalar, Lanes>};
}  // namespace kvfold
