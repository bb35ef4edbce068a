// The scale that is stored with a vector's codes.
#ifndef KVFOLD_SCALE_H
#define KVFOLD_SCALE_H

#include <cmath>

#include "../kvfold_cpu.h"

namespace kvfold {
namespace {

// Nearest integer, ties to even, of anything below 2^22: the sum has no bits for fractions.
inline float nearest_integer(float x) {
  constexpr float kShift = 12582912.0f;
  return (x + kShift) - kShift;
}

// What the codes of one try are worth: dot = <u, L>, square = |L|^2.
struct Fit {
  float dot, square;
  float gain() const { return (dot * dot) / square; }
};

inline float scale_of(int rule, float step, int dim, float radius, Fit fit) {
  const float normalised = radius * static_cast<float>(1.0 / std::sqrt(static_cast<double>(dim)));
  const float dims = static_cast<float>(dim);
  if (rule == KVF_SCALE_NORM) return normalised * step;
  if (rule == KVF_SCALE_UNBIASED) return (normalised * dims) / fit.dot;
  if (rule == KVF_SCALE_LEAST_SQUARES) return (normalised * fit.dot) / fit.square;
  return normalised * std::sqrt(dims / fit.square);
}

}  // namespace
}  // namespace kvfold
#endif
