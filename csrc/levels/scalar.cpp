// Portable level: no instruction set assumed. Slow; it defines what the others must compute.
#include "define_level.h"
#include "simd_scalar.h"

namespace kvfold {
namespace {
const char* available() { return ""; }
}  // namespace
const Level kScalar = line_level<SimdScalar>("scalar", available);
}  // namespace kvfold
