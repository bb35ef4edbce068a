// AVX-VNNI level: AVX2 with 256-bit vpdpbusd, one for the high and one for the low bytes of queries and weights.
#include "trellis_avx2.h"
// The reader of trellis codes above is to be known before the templates that use it.
#include "define_level.h"
#include "x86.h"

namespace kvfold {
namespace {

struct VnniDot {
  struct Sum { __m256i high, low; };
  using Operand = __m256i;
  static constexpr int kRows = 4;
  static constexpr bool unpacks(int, int) { return false; }
  static Sum zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static Operand split(__m256i level) { return level; }
  static Sum step(Sum sum, Operand level, const std::uint8_t* x) {
    sum.high = _mm256_dpbusd_avx_epi32(sum.high, level, Avx2Dot::broadcast(x));
    sum.low = _mm256_dpbusd_avx_epi32(sum.low, level, Avx2Dot::broadcast(x + 4));
    return sum;
  }
  static __m256i value(Sum sum) { return _mm256_add_epi32(_mm256_slli_epi32(sum.high, 8), sum.low); }
  static void expand(const std::int16_t* grid, std::uint8_t* operand) {
    for (int i = 0; i < 4; ++i) {
      operand[i] = static_cast<std::uint8_t>((grid[i] + 128) >> 8);
      operand[4 + i] = static_cast<std::uint8_t>(grid[i]);
    }
  }
  // The high byte is the second byte of grid + 128.
  static __m256i quads(__m256i grid) {
    const __m256i high = _mm256_add_epi32(grid, _mm256_set1_epi32(128));
    const __m256i both = _mm256_blendv_epi8(grid, high, _mm256_set1_epi16(static_cast<short>(0xFF00)));
    return _mm256_shuffle_epi8(both, _mm256_setr_epi8(1, 5, 9, 13, 0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, 1, 5, 9, 13, 0, 4, 8,
                                                      12, -1, -1, -1, -1, -1, -1, -1, -1));
  }
};

}  // namespace
const Level kAvxVnni = line_level<SimdAvx2<VnniDot>>("avx-vnni", avx_vnni_reason);
}  // namespace kvfold
