// NEON level, with the ARMv8.2 dot product.
#include "define_level.h"
#include "simd_neon.h"

#if defined(__linux__)
#include <sys/auxv.h>
#endif

namespace kvfold {
namespace {

const char* neon_reason() {
#if defined(__linux__)
  constexpr unsigned long kDotProduct = 1ul << 20, kHalf = 1ul << 10;  // HWCAP_ASIMDDP, HWCAP_ASIMDHP
  const unsigned long features = getauxval(AT_HWCAP);
  if ((features & kDotProduct) == 0 || (features & kHalf) == 0) return "the processor has no ARMv8.2 dot product";
#endif
  return "";  // every Apple processor has it
}

}  // namespace
const Level kNeon = line_level<SimdNeon>("neon", neon_reason);
}  // namespace kvfold
