// The scale that is stored with a vector's codes.
#ifndef KVFOLD_SCALE_H
#define KVFOLD_SCALE_H

#include <cmath>

#include "../kvfold_cpu.h"

namespace kvfold {
namespace {

// What the codes of one try are worth: dot = <u, L>, square = |L|^2.
struct Fit {
  float dot, square;
  float gain() const { return (dot * dot) / square; }
};

inline float scale_of(const kvf_side& side, int dim, float radius, Fit fit) {
  const float normalised = radius * static_cast<float>(1.0 / std::sqrt(static_cast<double>(dim)));
  const float dims = static_cast<float>(dim);
  if (side.scale_rule == KVF_SCALE_NORM) return normalised * side.step;
  if (side.scale_rule == KVF_SCALE_UNBIASED) return (normalised * dims) / fit.dot;
  if (side.scale_rule == KVF_SCALE_LEAST_SQUARES) return (normalised * fit.dot) / fit.square;
  return normalised * std::sqrt(dims / fit.square);
}

}  // namespace
}  // namespace kvfold
#endif
