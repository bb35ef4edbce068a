// unroll<N>(f) calls f with the integral constants 0 .. N-1: loops whose index must be an immediate.
#ifndef KVFOLD_UNROLL_H
#define KVFOLD_UNROLL_H

#include <utility>

// For what keeps arrays in registers: compilers leave functions of a few hundred instructions alone if they are called twice. Not with
// sanitizers, whose checks would make them a hundred times as long.
#if defined(__GNUC__) && !defined(__SANITIZE_ADDRESS__)
#define KVF_INLINE inline __attribute__((always_inline))
#define KVF_INLINE_LAMBDA __attribute__((always_inline))
#else
#define KVF_INLINE inline
#define KVF_INLINE_LAMBDA
#endif

namespace kvfold {
namespace {

template <class Body, int... I>
KVF_INLINE void unroll_over(const Body& body, std::integer_sequence<int, I...>) {
  (body(std::integral_constant<int, I>{}), ...);
}

template <int Count, class Body>
KVF_INLINE void unroll(const Body& body) {
  unroll_over(body, std::make_integer_sequence<int, Count>{});
}

}  // namespace
}  // namespace kvfold
#endif
