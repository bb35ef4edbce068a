/* The trellis encoder of kvfold's CPU library: plain C, see "Trellis codes" in FORMAT.md for every number. */
#ifndef KVFOLD_TRELLIS_H
#define KVFOLD_TRELLIS_H

#include "kvfold_cpu.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { KVF_TRELLIS_STATE_BITS = 6, KVF_TRELLIS_PERIOD = 4, KVF_TRELLIS_LEVELS = 64, KVF_TRELLIS_WIDTH = 4 };

/* A shift-register code: step t shifts width[t % period] new bits into a state of six; the window of both selects a level. */
struct kvf_trellis {
  int32_t period;
  int32_t width[KVF_TRELLIS_PERIOD];         /* 1 to 4 bits per step */
  const uint8_t* index[KVF_TRELLIS_PERIOD];  /* level of each window, 2^(6 + width) of them */
  int32_t levels;                            /* different ones */
  int16_t level[KVF_TRELLIS_LEVELS]; /* in the unit of the inputs */
  int32_t grid;                      /* units of the inputs to a unit of the levels that attention reads */
  int32_t clip;                      /* of inputs */
  int32_t shift;                     /* of squared errors */
  float gain;                        /* units of the inputs to a standard deviation */
  uint64_t starts;                   /* bit s: state s may be the first */
};

/* The symbols and start states of `vectors` inputs [vectors, dim] with the smallest metric. symbols [vectors, dim]; starts [vectors]:
   first states. level: of kvf_level_count, -1 for the best. */
KVF_EXPORT int32_t kvf_trellis_encode(const kvf_trellis* code, int32_t level, int32_t threads, const int16_t* inputs, int64_t vectors,
                                      int32_t dim, uint8_t* symbols, uint8_t* starts);

#ifdef __cplusplus
}
#endif
#endif
