// Four lanes in portable C++: the meaning of every operation the other levels spell with instructions.
#ifndef KVFOLD_SIMD_SCALAR_H
#define KVFOLD_SIMD_SCALAR_H

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../half.h"
#include "level.h"
#include "planes.h"
#include "unroll.h"

namespace kvfold {
namespace {

struct SimdScalar : OneGroup {
  static constexpr int kWidth = 4;
  static constexpr int kBytes = 16;
  static constexpr int kBias = 0;  // added to levels by the lookup table
  static constexpr bool kMergesPairs = false;
  struct Float { float v[4]; };
  struct Int { std::int32_t v[4]; };
  struct Codes { std::uint8_t v[16]; };

  template <class Body>
  static Float each(const Body& body) {
    Float out;
    for (int i = 0; i < 4; ++i) out.v[i] = body(i);
    return out;
  }

  static Float load(const float* p) { return each([&](int i) { return p[i]; }); }
  static Float load_half(const std::uint16_t* p) { return each([&](int i) { return half_to_float(p[i]); }); }
  static Float load_bfloat16(const std::uint16_t* p) { return each([&](int i) { return bfloat16_to_float(p[i]); }); }
  static Float load_int8(const std::int8_t* p) { return each([&](int i) { return static_cast<float>(p[i]); }); }
  static Float load_int32(const std::int32_t* p) { return each([&](int i) { return static_cast<float>(p[i]); }); }
  static void store(float* p, Float a) { std::memcpy(p, a.v, sizeof a.v); }
  static Float set(float x) { return each([&](int) { return x; }); }
  static Float add(Float a, Float b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
  static Float sub(Float a, Float b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
  static Float mul(Float a, Float b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
  static Float fma(Float a, Float b, Float c) { return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
  static Float max(Float a, Float b) { return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
  static Float exp2(Float a) { return each([&](int i) { return std::exp2(a.v[i]); }); }
  static float reduce_max(Float a) {
    const Float b = max(a, {{a.v[2], a.v[3], a.v[0], a.v[1]}});
    return b.v[0] > b.v[1] ? b.v[0] : b.v[1];
  }
  static float reduce_add(Float a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }  // the halving tree

  static Int round(Float a) {
    Int out;
    for (int i = 0; i < 4; ++i) out.v[i] = static_cast<std::int32_t>(std::nearbyint(a.v[i]));
    return out;
  }
  static Int zero_int() { return {{0, 0, 0, 0}}; }
  static Int add_int(Int a, Int b) {
    for (int i = 0; i < 4; ++i)  // modulo 2^32, like the instructions
      a.v[i] = static_cast<std::int32_t>(static_cast<std::uint32_t>(a.v[i]) + static_cast<std::uint32_t>(b.v[i]));
    return a;
  }
  static Int load_ints(const std::uint8_t* p) {
    Int out;
    std::memcpy(out.v, p, sizeof out.v);
    return out;
  }
  static std::int32_t reduce_add_int(Int a) { return a.v[0] + a.v[1] + a.v[2] + a.v[3]; }

  // One stage of the Hadamard transform inside a register.
  template <int Half>
  static Float butterfly(Float a) {
    return each([&](int i) { return (i & Half) != 0 ? a.v[i - Half] - a.v[i] : a.v[i] + a.v[i + Half]; });
  }
  // Rows of a matrix -> its columns.
  static KVF_INLINE void transpose(Float* m) {
    for (int i = 0; i < 4; ++i)
      for (int j = i + 1; j < 4; ++j) {
        const float a = m[i].v[j];
        m[i].v[j] = m[j].v[i];
        m[j].v[i] = a;
      }
  }

  // A codebook: how many thresholds lie strictly below a number, and the level of that code.
  template <int Bits>
  class Grid {
   public:
    explicit Grid(const kvf_side& of) : side(of) {}
    KVF_INLINE Int nearest(Float a) const {
      Int code = zero_int();
      for (int t = 0; t < (1 << Bits) - 1; ++t)
        for (int i = 0; i < 4; ++i) code.v[i] += a.v[i] > side.thresholds[t] ? 1 : 0;
      return code;
    }
    KVF_INLINE Float level(Int code) const {
      return each([&](int i) { return static_cast<float>(side.levels[code.v[i]]); });
    }

   private:
    const kvf_side& side;
  };

  // Codes of four coordinates -> bytes of one word per lane.
  static Int join(Int a, Int b, Int c, Int d) {
    for (int i = 0; i < 4; ++i) a.v[i] |= b.v[i] << 8 | c.v[i] << 16 | d.v[i] << 24;
    return a;
  }
  static void store_ints(std::uint8_t* p, Int a) { std::memcpy(p, a.v, sizeof a.v); }
  // 4 x 4 bytes turned.
  static void store_turned(std::uint8_t* p, Int a) {
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 4; ++k) p[4 * i + k] = static_cast<std::uint8_t>(a.v[k] >> (8 * i));
  }

  static KVF_INLINE void prefetch(const void*) {}
  static KVF_INLINE void prefetch_early(const void*) {}
  static KVF_INLINE void prefetch_codes(const std::uint8_t*) {}
  static Codes load_codes(const std::uint8_t* p) {
    Codes out;
    std::memcpy(out.v, p, sizeof out.v);
    return out;
  }
  template <int Shift>
  static Codes shift(Codes a) {
    for (auto& byte : a.v) byte = static_cast<std::uint8_t>(byte >> Shift);
    return a;
  }
  template <int LowShift, int HighBit>
  static Codes merge(Codes low, Codes high) {
    for (int i = 0; i < 16; ++i)
      low.v[i] = static_cast<std::uint8_t>(((low.v[i] >> LowShift) & 3) | (((high.v[i] >> HighBit) & 1) << 2));
    return low;
  }

  // Four 16-bit integers of a row go to 8 bytes of the operand.
  static void expand(const std::int16_t* grid, std::uint8_t* operand) { std::memcpy(operand, grid, 8); }
  static void store_quads(Int grid, std::uint8_t* operand) {
    std::int16_t narrow[4];
    for (int i = 0; i < 4; ++i) narrow[i] = static_cast<std::int16_t>(grid.v[i]);
    expand(narrow, operand);
  }

  template <int Bits, int Quads, int Rows>
  static void dot(const Parts& parts, const std::uint8_t* operand, const std::int32_t*, const std::uint8_t* table, std::int32_t* out) {
    std::memset(out, 0, sizeof(std::int32_t) * Rows * kLanes);
    for (int part = 0; part < parts.count; ++part, operand += 8 * Quads)
      for (int quarter = 0; quarter < 4; ++quarter)
        walk<SimdScalar, Bits, Quads>(parts.codes[part], quarter, [&](int quad, Codes codes) {
          for (int r = 0; r < Rows; ++r) {
            std::int16_t x[4];
            std::memcpy(x, operand + 8 * quad + r * kOperandRow, 8);
            for (int i = 0; i < 16; ++i)
              out[r * kLanes + 4 * quarter + i / 4] +=
                  static_cast<std::int8_t>(Bits == kLevelBits ? codes.v[i] : table[codes.v[i] & 15]) * x[i % 4];
          }
        });
  }
};

}  // namespace
}  // namespace kvfold
#endif
