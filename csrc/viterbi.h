// One block of vectors for the trellis encoder, and the encoders of each instruction set.
#ifndef KVFOLD_VITERBI_TASK_H
#define KVFOLD_VITERBI_TASK_H

#include <cstdint>

#include "kvfold_trellis.h"

namespace kvfold {

struct ViterbiTask {
  const kvf_trellis* code;
  const std::int16_t* inputs;  // [vectors, dim]
  std::uint8_t* symbols;       // [vectors, dim]
  std::uint8_t* starts;        // [vectors]
  std::int64_t vectors;        // at most `lanes`
  int dim;
};

struct Viterbi {
  int lanes;
  void (*encode)(const ViterbiTask& task);
};

extern const Viterbi kViterbiScalar;
#if defined(__x86_64__) || defined(_M_X64)
extern const Viterbi kViterbiAvx2, kViterbiAvx512;
#endif

}  // namespace kvfold
#endif
