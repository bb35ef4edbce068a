// Viterbi search over 64 states for many vectors at once: one vector per 16-bit lane, so that states, predecessors and level indices
// are the same for all lanes and nothing is shuffled. `Simd` supplies kLanes, Reg and the operations used below.
#ifndef KVFOLD_VITERBI_H
#define KVFOLD_VITERBI_H

#include <cstdint>
#include <vector>

#include "../kvfold_trellis.h"
#include "../viterbi.h"

namespace kvfold {
namespace {

constexpr int kStateBits = KVF_TRELLIS_STATE_BITS;
constexpr int kStates = 1 << kStateBits;
constexpr int kRenormalise = 16;      // steps between subtractions of the smallest metric
constexpr int kErrorTop = 255;        // errors are clipped to it: its square fills 16 bits
constexpr std::uint16_t kForbidden = 65535;

template <class Simd, int kWidth>
void viterbi_step(const std::uint8_t* index, const std::uint16_t* metric, const std::uint16_t* cost, std::uint16_t* next,
                  std::uint8_t* back) {
  using Reg = typename Simd::Reg;
  constexpr int kPredecessors = 1 << kWidth, kGroups = kStates >> kWidth, kLanes = Simd::kLanes;
  for (int g = 0; g < kGroups; ++g) {
    for (int j = 0; j < kPredecessors; ++j) {
      const int s = g << kWidth | j;
      Reg best = Simd::add(Simd::load(cost + g * kLanes), Simd::load(metric + index[s] * kLanes));
      Reg from = Simd::set(0);
      for (int p = 1; p < kPredecessors; ++p) {
        const Reg sum = Simd::add(Simd::load(cost + (p * kGroups + g) * kLanes), Simd::load(metric + index[p << kStateBits | s] * kLanes));
        from = Simd::where_less(sum, best, Simd::set(static_cast<std::uint16_t>(p)), from);
        best = Simd::min(sum, best);
      }
      Simd::store(next + s * kLanes, best);
      Simd::store_bytes(back + s * kLanes, from);
    }
  }
}

// Up to kLanes vectors; those beyond `vectors` repeat the last.
template <class Simd>
void viterbi(const ViterbiTask& task) {
  using Reg = typename Simd::Reg;
  constexpr int kLanes = Simd::kLanes;
  const kvf_trellis& code = *task.code;
  static thread_local std::vector<std::uint8_t> backs;
  backs.resize(static_cast<std::size_t>(task.dim) * kStates * kLanes);
  alignas(64) std::uint16_t costs[2][kStates * kLanes], metric[KVF_TRELLIS_LEVELS * kLanes], lane[kLanes];
  std::uint16_t *cost = costs[0], *next = costs[1];
  for (int s = 0; s < kStates; ++s)
    for (int i = 0; i < kLanes; ++i) cost[s * kLanes + i] = (code.starts >> s & 1) != 0 ? 0 : kForbidden;
  for (int t = 0; t < task.dim; ++t) {
    for (int i = 0; i < kLanes; ++i) {
      const std::int64_t v = i < task.vectors ? i : task.vectors - 1;
      lane[i] = static_cast<std::uint16_t>(task.inputs[v * task.dim + t]);
    }
    const Reg x = Simd::load(lane), top = Simd::set(kErrorTop);
    for (int a = 0; a < code.levels; ++a) {
      const Reg error = Simd::min(Simd::distance(x, Simd::set(static_cast<std::uint16_t>(code.level[a]))), top);
      Simd::store(metric + a * kLanes, Simd::shift(Simd::multiply(error, error), code.shift));
    }
    const int phase = t % code.period;
    std::uint8_t* back = backs.data() + static_cast<std::size_t>(t) * kStates * kLanes;
    const std::uint8_t* index = code.index[phase];
    switch (code.width[phase]) {
      case 1: viterbi_step<Simd, 1>(index, metric, cost, next, back); break;
      case 2: viterbi_step<Simd, 2>(index, metric, cost, next, back); break;
      case 3: viterbi_step<Simd, 3>(index, metric, cost, next, back); break;
      default: viterbi_step<Simd, 4>(index, metric, cost, next, back); break;
    }
    if (t % kRenormalise == kRenormalise - 1) {
      Reg least = Simd::load(next);
      for (int s = 1; s < kStates; ++s) least = Simd::min(least, Simd::load(next + s * kLanes));
      for (int s = 0; s < kStates; ++s) Simd::store(next + s * kLanes, Simd::subtract(Simd::load(next + s * kLanes), least));
    }
    std::uint16_t* swap = cost;
    cost = next;
    next = swap;
  }
  int state[kLanes] = {};
  for (int s = 1; s < kStates; ++s)
    for (int v = 0; v < kLanes; ++v)
      if (cost[s * kLanes + v] < cost[state[v] * kLanes + v]) state[v] = s;
  // All vectors together: each walks a chain of dependent loads.
  for (int t = task.dim - 1; t >= 0; --t) {
    const int width = code.width[t % code.period];
    const std::uint8_t* back = backs.data() + static_cast<std::size_t>(t) * kStates * kLanes;
    for (int v = 0; v < task.vectors; ++v) {
      task.symbols[v * task.dim + t] = static_cast<std::uint8_t>(state[v] & ((1 << width) - 1));
      state[v] = (back[state[v] * kLanes + v] << kStateBits | state[v]) >> width;
    }
  }
  for (int v = 0; v < task.vectors; ++v) task.starts[v] = static_cast<std::uint8_t>(state[v]);
}

}  // namespace
}  // namespace kvfold
#endif
