// kernels/enter.cuh compiled for the host: blocks one after another, the threads of a block too, up to the barrier and from it on. The last
// request comes first: a GPU promises no order, and a later request could read what one before it stores.
#define DI inline
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
#include "../../src/kvfold/engine/cuda/kernels/enter.cuh"

namespace {

template <int D> void run(const EnterArgs& P, int rows, int threads) {
  for (int b = rows - 1; b >= 0; b--)
    for (int head = 0; head < P.H; head++)
      for (int value = 0; value < 2; value++) {
        for (int t = 0; t < threads; t++) gather<D>(P, b, head, value, t, threads);
        for (int t = 0; t < threads; t++) store<D>(P, b, head, value, t, threads);
      }
}

}  // namespace

extern "C" int enter_bytes() { return sizeof(EnterArgs); }
extern "C" void enter(const EnterArgs* P, int rows, int dim, int threads) {
  if (dim == 64) run<64>(*P, rows, threads);
  if (dim == 128) run<128>(*P, rows, threads);
}
