// The C interface of the trellis encoder: checks, the choice of instruction set, and blocks of vectors for the pool.
#include <cstring>

#include "kvfold_trellis.h"
#include "levels.h"
#include "pool.h"
#include "viterbi.h"

namespace {

bool usable(const kvf_trellis& code) {
  if (code.period < 1 || code.period > KVF_TRELLIS_PERIOD || code.levels < 1 || code.levels > KVF_TRELLIS_LEVELS) return false;
  if (code.starts == 0 || code.shift < 0 || code.shift > 15) return false;
  for (int i = 0; i < code.period; ++i)
    if (code.width[i] < 1 || code.width[i] > KVF_TRELLIS_WIDTH || code.index[i] == nullptr) return false;
  return true;
}

const kvfold::Viterbi& encoder(const kvfold::Level& level) {
#if defined(__x86_64__) || defined(_M_X64)
  if (&level == &kvfold::kAvx512Vnni) return kvfold::kViterbiAvx512;
  if (&level == &kvfold::kAvx2 || &level == &kvfold::kAvxVnni) return kvfold::kViterbiAvx2;
#if defined(__linux__)
  if (&level == &kvfold::kAmx) return kvfold::kViterbiAvx512;
#endif
#endif
  (void)level;
  return kvfold::kViterbiScalar;
}

}  // namespace

extern "C" int32_t kvf_trellis_encode(const kvf_trellis* code, int32_t level, int32_t threads, const int16_t* inputs, int64_t vectors,
                                      int32_t dim, uint8_t* symbols, uint8_t* starts) {
  if (code == nullptr || !usable(*code) || vectors < 0 || dim < 1) return KVF_UNSUPPORTED;
  const kvfold::Level* chosen = kvfold::choose_level(level);
  if (chosen == nullptr) return KVF_NO_LEVEL;
  const kvfold::Viterbi& viterbi = encoder(*chosen);
  kvfold::parallel_for(threads, (vectors + viterbi.lanes - 1) / viterbi.lanes, [&](std::int64_t block) {
    const std::int64_t first = block * viterbi.lanes, left = vectors - first;
    viterbi.encode({code, inputs + first * dim, symbols + first * dim, starts + first, left < viterbi.lanes ? left : viterbi.lanes, dim});
  });
  return KVF_OK;
}
