// AVX2 level: exact 16-bit queries and weights by vpmaddwd.
#include "trellis_avx2.h"
// The reader of trellis codes above is to be known before the templates that use it.
#include "define_level.h"
#include "x86.h"

namespace kvfold {
const Level kAvx2 = line_level<SimdAvx2<Avx2Dot>>("avx2", avx2_reason);
}  // namespace kvfold
