/* The C interface of kvfold's CPU engine. Plain C, so that any language can load the library without a compiler.

   Every function returns KVF_OK or the reason it did nothing. Arrays are borrowed for the duration of the call. The library keeps
   no state between calls except its thread pool. All sizes are in tokens, heads and elements unless the name says bytes. */
#ifndef KVFOLD_CPU_H
#define KVFOLD_CPU_H

#include <stdint.h>

#if defined(_WIN32)
#define KVF_EXPORT __declspec(dllexport)
#else
#define KVF_EXPORT __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define KVF_ABI_VERSION 6

enum { KVF_OK = 0, KVF_UNSUPPORTED = 1, KVF_NON_FINITE = 2, KVF_NO_LEVEL = 3, KVF_NO_MEMORY = 4, KVF_NOT_A_PAGE = 5 };
enum { KVF_FLOAT32 = 0, KVF_BFLOAT16 = 1, KVF_FLOAT16 = 2 };
enum { KVF_SCALE_NORM = 0, KVF_SCALE_UNBIASED = 1, KVF_SCALE_LEAST_SQUARES = 2, KVF_SCALE_MATCH = 3 };

/* How attention reads a trellis code ("Trellis codes" in FORMAT.md). Bits of a vector are one stream, in the order in which they enter
   the register; a window is the 6 + width bits that end with a step's last, the oldest in bit 0. Coordinates alternate between widths.
   index = affine_low applied to the window's low byte, exclusive or affine_high applied to the rest, each a matrix of bits as
   x86's gf2p8affineqb takes it; level = levels[index]. There are 16, 32 or 64 levels (fewer at one bit), as the highest
   row used of any matrix has it; level n from the end is minus level n. pairs[w] holds the two levels of two steps, w being the first
   window and the bits after it. starts: the six bits before the first, oldest in bit 0, by stored number. */
typedef struct kvf_trellis_reader {
  int32_t widths[2];
  uint64_t affine_low[2];
  uint64_t affine_high[2];
  int8_t levels[64];
  uint8_t starts[4];
  const int8_t* pairs; /* [2^(6 + both widths)][2] */
} kvf_trellis_reader;

typedef struct kvf_trellis kvf_trellis; /* how it is written: kvfold_trellis.h */

/* One side (keys or values) of a codec: how scales are chosen, how many codebook grids or gains (1 or 3) the encoder tries per vector, what
   a level's unit is worth in standard deviations, and for a trellis code how it is read and, if it is to be folded, written. A scalar one:
   2^bits ascending integer levels and the thresholds between them. */
typedef struct kvf_side {
  int32_t bits;
  int32_t scale_rule;
  int32_t searches;
  float step;
  float thresholds[15];
  int8_t levels[16];
  const kvf_trellis_reader* trellis; /* null: scalar */
  const kvf_trellis* search;         /* null: pages of this side are only read */
} kvf_side;

/* What a page of one layer looks like. signs: [kv_heads, head_dim] of +1/-1 for each side. */
typedef struct kvf_format {
  int32_t head_dim;
  int32_t kv_heads;
  int32_t sinks;
  int32_t centre;
  kvf_side key;
  kvf_side value;
  const float* key_signs;
  const float* value_signs;
} kvf_format;

/* A strided array of vectors; the last dimension (head_dim) is contiguous. Strides are in elements; outer is pages or rows of a
   batch, inner is tokens or slots. */
typedef struct kvf_vectors {
  const void* data;
  int64_t outer_stride;
  int64_t head_stride;
  int64_t inner_stride;
} kvf_vectors;

/* One sequence of a batch before the call: sinks, pages, then `recent` exact tokens. */
typedef struct kvf_sequence {
  const uint64_t* pages; /* addresses of ceil(folded / 128) pages, oldest first; each 64-byte aligned for full speed */
  int64_t folded;        /* tokens in pages; the last page may be partly valid */
  int64_t recent;
  int64_t pads; /* left pads among the call's tokens */
  kvf_vectors recent_key, recent_value; /* [kv_heads, recent, head_dim] */
  kvf_vectors sink_key, sink_value;     /* [kv_heads, sinks, head_dim]  */
  /* Null: recent tokens follow each other. Else they lie in blocks of a pool, `recent_block` tokens in each and outer_stride from
     block to block: token t in block recent_table[t / recent_block]. */
  const int32_t* recent_table;
  int64_t recent_block;
  int64_t skipped; /* leading tokens of the first page that no query reads, in layers whose window has passed them */
} kvf_sequence;

typedef struct kvf_attend_request {
  const kvf_format* format;
  const kvf_sequence* sequences; /* [batch] */
  int32_t batch;
  int32_t query_heads;
  int32_t query_tokens;
  int32_t query_dtype;
  int32_t exact_dtype; /* of recent, sink and new tokens */
  int32_t level;       /* index from kvf_level_count, -1 for the best one */
  int32_t threads;
  float softmax_scale;
  kvf_vectors query;              /* [batch, query_heads, query_tokens, head_dim] */
  kvf_vectors new_key, new_value; /* [batch, kv_heads, query_tokens, head_dim]    */
  void* output;                   /* [batch, query_heads, query_tokens, head_dim] contiguous, query_dtype */
} kvf_attend_request;

KVF_EXPORT int32_t kvf_abi_version(void);

/* What the library was built from: the hash that CMakeLists.txt makes of its sources; empty in builds without CMake. */
KVF_EXPORT const char* kvf_sources(void);

/* Levels are SIMD instruction sets, best first. `reason` is empty when the level can run here, else says what is missing. */
KVF_EXPORT int32_t kvf_level_count(void);
KVF_EXPORT const char* kvf_level_name(int32_t level);
KVF_EXPORT const char* kvf_level_reason(int32_t level);

/* Bytes of one page row (all KV heads), 0 if the format is not supported. */
KVF_EXPORT int64_t kvf_row_bytes(const kvf_format* format);

/* keys, values: [pages, kv_heads, 128, head_dim] of dtype. first_page: pages[0] starts the sequence, so its sinks stay out of the
   mean. Nothing is promised about `rows` unless KVF_OK is returned. */
KVF_EXPORT int32_t kvf_fold(const kvf_format* format, int32_t level, int32_t threads, int32_t dtype, kvf_vectors keys,
                            kvf_vectors values, int64_t pages, int32_t first_page, const uint64_t* rows);

/* The inverse up to the codec's loss: keys, values float32 [kv_heads, 128, head_dim], contiguous. */
KVF_EXPORT int32_t kvf_unfold(const kvf_format* format, int32_t level, const uint8_t* row, float* keys, float* values);

/* The byte orders of the engine and of files are permutations of each other. */
KVF_EXPORT int32_t kvf_to_canonical(const kvf_format* format, const uint8_t* row, uint8_t* canonical);
KVF_EXPORT int32_t kvf_from_canonical(const kvf_format* format, const uint8_t* canonical, uint8_t* row);

KVF_EXPORT int32_t kvf_attend(const kvf_attend_request* request);

/* Ask the system for huge pages under a slab; only a hint. */
KVF_EXPORT void kvf_advise_huge(void* slab, int64_t bytes);

/* Read `bytes` once with the widest loads of the level and `threads` threads: the floor no kernel can beat. Returns a checksum. */
KVF_EXPORT int64_t kvf_read(int32_t level, int32_t threads, const uint64_t* addresses, int64_t count, int64_t bytes);

#ifdef __cplusplus
}
#endif
#endif
