// unroll<N>(f) calls f with the integral constants 0 .. N-1: loops whose index must be an immediate.
#ifndef KVFOLD_UNROLL_H
#define KVFOLD_UNROLL_H

#include <utility>

namespace kvfold {
namespace {

template <class Body, int... I>
inline void unroll_over(const Body& body, std::integer_sequence<int, I...>) {
  (body(std::integral_constant<int, I>{}), ...);
}

template <int Count, class Body>
inline void unroll(const Body& body) {
  unroll_over(body, std::make_integer_sequence<int, Count>{});
}

}  // namespace
}  // namespace kvfold
#endif
