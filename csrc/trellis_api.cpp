// The C interface of the trellis encoder: checks, the choice of instruction set, and blocks of vectors for the pool.
#include <vector>

#include "levels.h"
#include "pool.h"

extern "C" int32_t kvf_trellis_encode(const kvf_trellis* code, int32_t level, int32_t threads, const int16_t* inputs, int64_t vectors,
                                      int32_t dim, uint8_t* symbols, uint8_t* starts) {
  if (code == nullptr || !kvfold::usable(*code) || vectors < 0 || dim < 1) return KVF_UNSUPPORTED;
  const kvfold::Level* chosen = kvfold::choose_level(level);
  if (chosen == nullptr) return KVF_NO_LEVEL;
  const kvfold::TrellisEncoder& encoder = kvfold::trellis_encoder(*chosen);
  const std::int64_t lanes = encoder.lanes;
  kvfold::parallel_for(threads, (vectors + lanes - 1) / lanes, [&](std::int64_t block) {
    const std::int64_t first = block * lanes, count = vectors - first < lanes ? vectors - first : lanes, size = dim * lanes;
    std::vector<std::int16_t> turned(size);
    std::vector<std::uint8_t> found(size), states(lanes);
    std::vector<std::int8_t> levels(size);
    for (std::int64_t v = 0; v < lanes; ++v)  // lanes beyond the last vector repeat it
      for (std::int64_t t = 0; t < dim; ++t) turned[t * lanes + v] = inputs[(first + (v < count ? v : count - 1)) * dim + t];
    encoder.search({code, turned.data(), found.data(), levels.data(), states.data(), dim});
    for (std::int64_t v = 0; v < count; ++v) {
      for (std::int64_t t = 0; t < dim; ++t) symbols[(first + v) * dim + t] = found[t * lanes + v];
      starts[first + v] = states[v];
    }
  });
  return KVF_OK;
}
