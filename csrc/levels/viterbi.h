// Viterbi search over 64 states for many vectors at once: one vector per 16-bit lane, so that states, predecessors and level indices
// are the same for all lanes and nothing is shuffled. `Lanes` supplies kLanes, Reg, the operations used below, and kScarceLoads: whether
// the search is bound by loads, as with registers so wide that one of them is a cycle's.
//
// A branch is an addition and a minimum. To know afterwards which predecessor it came from, a cost carries bits of its own state's number
// below it: kPacked of them, the highest, which are also the highest of what the next step calls the predecessor. The minimum then takes
// the lowest predecessor among equals by itself. What does not fit is found by comparisons, as everything is when kPacked is 0.
//
// That leaves 16 - kPacked bits for costs. Larger ones are cut off, and a search is repeated without packing if that could have changed
// its result. It could not if the best path costs less in all than `trusted`, the least cost that was ever cut off: costs
// never fall along a path and every cost below the mark was computed exactly, so no path through a cut one is as cheap.
#ifndef KVFOLD_VITERBI_H
#define KVFOLD_VITERBI_H

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../trellis_encoder.h"

namespace kvfold {
namespace {

constexpr int kStateBits = KVF_TRELLIS_STATE_BITS;
constexpr int kStates = 1 << kStateBits;
constexpr int kWindows = kStates << KVF_TRELLIS_WIDTH;
constexpr int kRenormalise = 16;  // steps between subtractions of the smallest metric
constexpr int kErrorTop = 255;    // errors are clipped to it: its square fills 16 bits
constexpr int kCostTop = 65535;
constexpr int kMostPacked = 4;

// A code as the search reads it.
struct Paths {
  Paths(const kvf_trellis& c, int lanes) : code(c) {
    for (int phase = 0; phase < code.period; ++phase) {
      const int width = code.width[phase], predecessors = 1 << width;
      for (int s = 0; s < kStates; ++s)
        for (int p = 0; p < predecessors; ++p) {
          const int window = p << kStateBits | s, level = code.index[phase][window];
          metric[phase][s << width | p] = static_cast<std::uint16_t>(level * lanes);
          value[phase][window] = static_cast<std::int8_t>(code.level[level] / code.grid);
        }
    }
  }

  const kvf_trellis& code;
  std::uint16_t metric[KVF_TRELLIS_PERIOD][kWindows];  // [next state][predecessor]: where the branch's metric lies
  std::int8_t value[KVF_TRELLIS_PERIOD][kWindows];     // [window]: the level that attention reads
};

// What a squared error may be before shifted costs of `packed` fewer bits are cut off, and the least cost that is.
struct Cut {
  Cut(int shift, int packed) : error(kErrorTop), trusted(kCostTop >> packed) {
    while (error * error >> shift > kCostTop >> packed) --error;
    if (error < kErrorTop) trusted = error * error >> shift;
  }
  int error, trusted;
};

// As many bits as leave half as much again as the path of a Gaussian vector costs: 1.2 * 4^-bits of the variance per step.
inline int packed_bits(const kvf_trellis& code, int dim) {
  int bits = 0, narrowest = KVF_TRELLIS_WIDTH;
  for (int phase = 0; phase < code.period; ++phase) {
    bits += code.width[phase];
    if (code.width[phase] < narrowest) narrowest = code.width[phase];
  }
  const float rate = static_cast<float>(bits) / static_cast<float>(code.period);
  const float usual = static_cast<float>(dim) * code.gain * code.gain * 1.2f * std::exp2(-2 * rate - static_cast<float>(code.shift));
  int packed = narrowest < kMostPacked ? narrowest + 1 : kMostPacked;
  while (packed > 0 && 1.5f * usual > static_cast<float>(Cut(code.shift, packed).trusted)) --packed;
  return packed;
}

// Bits of a state's number that lie below its cost.
template <int kPacked>
constexpr std::uint16_t tag(int state) {
  return static_cast<std::uint16_t>(state >> (kStateBits - kPacked));
}

// Four at a time: taking a register apart is no load.
template <int kCount>
void offsets(const std::uint16_t* from, std::uint16_t* to) {
  constexpr int kOnce = kCount < 4 ? kCount : 4;
  for (int i = 0; i < kCount; i += kOnce) {
    std::uint64_t several = 0;
    std::memcpy(&several, from + i, sizeof *from * kOnce);
    for (int k = 0; k < kOnce; ++k) to[i + k] = static_cast<std::uint16_t>(several >> (16 * k));
  }
}

// Back pointers lie [pair of states][lane][state of the pair].
template <class Lanes, int kWidth, int kPacked>
void viterbi_step(const std::uint16_t* where, const std::uint16_t* metric, const std::uint16_t* cost, std::uint16_t* next,
                  std::uint8_t* back) {
  using Reg = typename Lanes::Reg;
  constexpr int kPredecessors = 1 << kWidth, kGroups = kStates >> kWidth, kLanes = Lanes::kLanes;
  constexpr int kTagged = kPacked < kWidth ? kPacked : kWidth, kUntagged = kWidth - kTagged;
  const Reg tags = Lanes::set((1 << kPacked) - 1);
  for (int g = 0; g < kGroups; ++g) {
    Reg old[kPredecessors];
    for (int p = 0; p < kPredecessors; ++p) old[p] = Lanes::load(cost + (p * kGroups + g) * kLanes);
    for (int j = 0; j < kPredecessors; j += 2) {
      const Reg own = Lanes::set(tag<kPacked>(g << kWidth | j));  // of both states: kPacked is less than kStateBits
      Reg from[2];
      for (int i = 0; i < 2; ++i) {
        const int s = g << kWidth | (j + i);
        std::uint16_t several[kPredecessors];
        const std::uint16_t* at = where + (s << kWidth);
        if constexpr (Lanes::kScarceLoads) {
          offsets<kPredecessors>(at, several);
          at = several;
        }
        Reg best = tags, low = tags;
        for (int untagged = 0; untagged < 1 << kUntagged; ++untagged) {
          Reg least = Lanes::add(old[untagged], Lanes::load(metric + at[untagged]));
          for (int tagged = 1; tagged < 1 << kTagged; ++tagged) {
            const int p = tagged << kUntagged | untagged;
            least = Lanes::min(least, Lanes::add(old[p], Lanes::load(metric + at[p])));
          }
          if (untagged == 0) {
            best = least;
            low = Lanes::set(0);
          } else {
            low = Lanes::where_less(least, best, Lanes::set(static_cast<std::uint16_t>(untagged)), low);
            best = Lanes::min(least, best);
          }
        }
        if constexpr (kPacked == 0) {
          from[i] = low;
          Lanes::store(next + s * kLanes, best);
        } else {
          from[i] = Lanes::bit_and(best, tags);
          if constexpr (kPacked > kWidth) from[i] = Lanes::template shift_right<kPacked - kTagged>(from[i]);
          if constexpr (kUntagged > 0) from[i] = Lanes::bit_or(Lanes::template shift_left<kUntagged>(from[i]), low);
          Lanes::store(next + s * kLanes, Lanes::bit_or(Lanes::and_not(best, tags), own));
        }
      }
      Lanes::store_bytes(back + (g << kWidth | j) * kLanes, Lanes::bit_or(from[0], Lanes::template shift_left<8>(from[1])));
    }
  }
}

template <class Lanes, int kPacked>
void viterbi_step_of(int width, const std::uint16_t* where, const std::uint16_t* metric, const std::uint16_t* cost, std::uint16_t* next,
                     std::uint8_t* back) {
  // packed_bits is never more than a width and one.
  if constexpr (kPacked <= 2)
    if (width == 1) return viterbi_step<Lanes, 1, kPacked>(where, metric, cost, next, back);
  if constexpr (kPacked <= 3)
    if (width == 2) return viterbi_step<Lanes, 2, kPacked>(where, metric, cost, next, back);
  if (width == 3) return viterbi_step<Lanes, 3, kPacked>(where, metric, cost, next, back);
  viterbi_step<Lanes, 4, kPacked>(where, metric, cost, next, back);
}

// False: the paths found may not be the best ones.
template <class Lanes, int kPacked>
bool search_packed(const Paths& paths, const SearchTask& task) {
  using Reg = typename Lanes::Reg;
  constexpr int kLanes = Lanes::kLanes, kAlign = 64;
  constexpr std::size_t kBack = std::size_t{kStates} * kLanes;  // bytes of a step
  const kvf_trellis& code = paths.code;
  static thread_local std::vector<std::uint8_t> memory;
  memory.resize(static_cast<std::size_t>(task.dim) * kBack + kAlign);
  std::uint8_t* backs = memory.data() + (kAlign - reinterpret_cast<std::uintptr_t>(memory.data()) % kAlign);
  alignas(64) std::uint16_t costs[2][kStates * kLanes], metric[KVF_TRELLIS_LEVELS * kLanes], total[kLanes], final_cost[kLanes];
  std::uint16_t *cost = costs[0], *next = costs[1];
  for (int s = 0; s < kStates; ++s)
    for (int i = 0; i < kLanes; ++i)
      cost[s * kLanes + i] = (code.starts >> s & 1) != 0 ? tag<kPacked>(s) : static_cast<std::uint16_t>(kCostTop);
  const Cut cut(code.shift, kPacked);
  const Reg top = Lanes::set(static_cast<std::uint16_t>(cut.error)), tags = Lanes::set((1 << kPacked) - 1);
  Reg subtracted = Lanes::set(0);
  for (int t = 0; t < task.dim; ++t) {
    const Reg x = Lanes::load(reinterpret_cast<const std::uint16_t*>(task.inputs) + t * kLanes);
    for (int a = 0; a < code.levels; ++a) {
      const Reg error = Lanes::min(Lanes::distance(x, Lanes::set(static_cast<std::uint16_t>(code.level[a]))), top);
      const Reg shifted = Lanes::shift(Lanes::multiply(error, error), code.shift);
      Lanes::store(metric + a * kLanes, Lanes::template shift_left<kPacked>(shifted));
    }
    const int phase = t % code.period;
    viterbi_step_of<Lanes, kPacked>(code.width[phase], paths.metric[phase], metric, cost, next, backs + t * kBack);
    if (t % kRenormalise == kRenormalise - 1) {
      Reg least = Lanes::load(next);
      for (int s = 1; s < kStates; ++s) least = Lanes::min(least, Lanes::load(next + s * kLanes));
      least = Lanes::and_not(least, tags);
      subtracted = Lanes::add(subtracted, least);
      for (int s = 0; s < kStates; ++s) Lanes::store(next + s * kLanes, Lanes::subtract(Lanes::load(next + s * kLanes), least));
    }
    std::uint16_t* swap = cost;
    cost = next;
    next = swap;
  }
  int state[kLanes];
  for (int v = 0; v < kLanes; ++v) {
    state[v] = 0;
    for (int s = 1; s < kStates; ++s)
      if (cost[s * kLanes + v] >> kPacked < cost[state[v] * kLanes + v] >> kPacked) state[v] = s;
    final_cost[v] = cost[state[v] * kLanes + v];
  }
  if constexpr (kPacked > 0) {
    Lanes::store(total, Lanes::add(subtracted, Lanes::and_not(Lanes::load(final_cost), tags)));
    for (const std::uint16_t all : total)
      if (all >> kPacked >= cut.trusted) return false;
  }
  // All vectors together: each walks a chain of dependent loads.
  for (int t = task.dim - 1; t >= 0; --t) {
    const int phase = t % code.period, width = code.width[phase], mask = (1 << width) - 1;
    const std::uint8_t* back = backs + t * kBack;
    const std::int8_t* value = paths.value[phase];
    for (int v = 0; v < kLanes; ++v) {
      const int s = state[v], window = back[(s & ~1) * kLanes + 2 * v + (s & 1)] << kStateBits | s;
      task.symbols[t * kLanes + v] = static_cast<std::uint8_t>(s & mask);
      task.levels[t * kLanes + v] = value[window];
      state[v] = window >> width;
    }
  }
  for (int v = 0; v < kLanes; ++v) task.starts[v] = static_cast<std::uint8_t>(state[v]);
  return true;
}

template <class Lanes>
void search(const Paths& paths, const SearchTask& task) {
  bool certain = false;
  switch (packed_bits(paths.code, task.dim)) {
    case 1: certain = search_packed<Lanes, 1>(paths, task); break;
    case 2: certain = search_packed<Lanes, 2>(paths, task); break;
    case 3: certain = search_packed<Lanes, 3>(paths, task); break;
    case 4: certain = search_packed<Lanes, 4>(paths, task); break;
    default: break;
  }
  if (!certain) search_packed<Lanes, 0>(paths, task);
}

template <class Lanes>
void search_task(const SearchTask& task) {
  search<Lanes>(Paths(*task.code, Lanes::kLanes), task);
}

}  // namespace
}  // namespace kvfold
#endif
