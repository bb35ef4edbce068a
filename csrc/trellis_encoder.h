// What the trellis encoder of an instruction set does. `lanes` vectors go through it side by side, one to a lane: arrays are
// [coordinate][lane].
#ifndef KVFOLD_TRELLIS_ENCODER_H
#define KVFOLD_TRELLIS_ENCODER_H

#include <cstdint>

#include "kvfold_trellis.h"

namespace kvfold {

struct SearchTask {
  const kvf_trellis* code;
  const std::int16_t* inputs;  // [dim][lanes]
  std::uint8_t* symbols;       // [dim][lanes]
  std::int8_t* levels;         // [dim][lanes], as attention reads them
  std::uint8_t* starts;        // [lanes]: first states
  int dim;
};

// One head's side of a page: vectors in, codes, headers and unit out.
struct TrellisFold {
  const kvf_side* side;
  const float* signs;  // [dim]
  const float* means;  // [2][dim], of both halves of the page; null: none
  const void* data;
  std::int64_t stride;  // elements from token to token
  int dtype;
  int dim;
  bool keys;
  int skipped;  // first tokens left out of the unit
  std::uint8_t *codes, *headers, *unit;
};

struct TrellisEncoder {
  int lanes;
  void (*search)(const SearchTask& task);
  bool (*fold)(const TrellisFold& task);  // false: a vector is not finite or the unit no float16
};

extern const TrellisEncoder kEncodeScalar;
#if defined(__x86_64__) || defined(_M_X64)
extern const TrellisEncoder kEncodeAvx2, kEncodeAvx512;
#elif defined(__aarch64__)
extern const TrellisEncoder kEncodeNeon;
#endif

}  // namespace kvfold
#endif
