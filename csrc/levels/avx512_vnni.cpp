// AVX-512 level: VBMI lookups and 512-bit VNNI dot products.
#include "simd_avx512.h"
#include "trellis_avx512.h"
// The reader of trellis codes above is to be known before the templates that use it.
#include "define_level.h"
#include "x86.h"

namespace kvfold {
const Level kAvx512Vnni = line_level<SimdAvx512>("avx512-vnni", avx512_vnni_reason);
}  // namespace kvfold
