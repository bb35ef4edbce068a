// Trellis codes: a lane's run of consecutive coordinates of each of its tokens is one stream of bits, most significant first.
//
// Keys: lane 4g + t holds coordinates (D/4) t .. of tokens 8 i + g, i = 0..7; step s, half h, byte b of an A fragment is coordinate 8 s + 4 h + b
// of the run, and the rotated query lies in that order (quantize). Values: coordinates (D/8) g .. of tokens 8 (4 f + b) + t + 4 r, numbered
// 8 f + 4 r + b, as a lane's part of every output tile is anyway. A run begins with the register that the lane before leaves: one shuffle; the
// first run of a token with the start state of its header. Two coordinates at a time: the bits of both and the six before them are
// the number of a table's entry, two levels. A table is stored several times side by side, each copy in banks of its own and read by every
// COPIES-th lane, because banks that 32 lanes hit at random cost 3.5 cycles a look-up, of 4 lanes 2.1. Bound: the integer pipe, which makes their addresses.
#pragma once
#include "formats.cuh"
constexpr int REGISTER = 6;                       // bits
#if !defined(__CUDA_ARCH__) || (__CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200)
constexpr int SHARED_LIMIT = 232448;              // bytes of shared memory of one block, see arguments.shared_limit
#elif __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 870
constexpr int SHARED_LIMIT = 166912;
#else
constexpr int SHARED_LIMIT = 101376;
#endif
constexpr int TABLE_LIMIT = SHARED_LIMIT > 131072 ? 32768 : 8192, ROW = 128;                  // bytes of all copies of a table; of one word in every bank
__host__ __device__ constexpr int table_bytes(int format) { return is_trellis(format) ? 2 << (REGISTER + pair_bits(format)) : 0; }
__host__ __device__ constexpr int copies_of(int format) { return table_bytes(format) * 8 <= TABLE_LIMIT ? 8 : table_bytes(format) * 4 <= TABLE_LIMIT ? 4 : table_bytes(format) * 2 <= TABLE_LIMIT ? 2 : 1; }

template <int F_, int TOKENS_, int RUN_> struct Runs {               // RUN: coordinates
  static constexpr int F = F_, TOKENS = TOKENS_, RUN = RUN_;
  static constexpr int BITS = RUN * pair_bits(F) / 2, WORDS = TOKENS * BITS / 32, HELD = (REGISTER + BITS + 31) / 32, PIECE = WORDS % 4 ? 2 : 4;
};
// Two levels + ZERO of every window, from global to shared memory by the whole block.
template <int F> DI void copy_table(unsigned char* to, const u32* from) {
  constexpr int COPIES = copies_of(F), WORDS = ROW / 4 / COPIES;     // of a row, for one copy
  for (int i = threadIdx.x; i < table_bytes(F) / 4; i += blockDim.x) {
    const u32 two = __ldg(from + i);
#pragma unroll
    for (int c = 0; c < COPIES; c++) ((u32*)to)[i / WORDS * (ROW / 4) + c * WORDS + i % WORDS] = two;
  }
}
// A lane's copy of a table in shared memory. `copies` is a number that the compiler does not know: a multiplication is on another pipe than a shift.
struct Lookup { u32 at, copies; };
template <int F> DI Lookup lookup(u32 table, int lane) {
  Lookup l; constexpr int COPIES = copies_of(F); l.at = table + lane % COPIES * (ROW / COPIES);
  asm volatile("mov.u32 %0,%1;" : "=r"(l.copies) : "n"(COPIES)); return l;
}
template <class R> DI void load_stream(u32 (&w)[R::WORDS], u32 base, int lane) {
#pragma unroll
  for (int i = 0; i < R::WORDS / R::PIECE; i++) {
    if constexpr (R::PIECE == 4) { uint4 v = lds4(base + i * 512 + lane * 16); w[4 * i] = v.x; w[4 * i + 1] = v.y; w[4 * i + 2] = v.z; w[4 * i + 3] = v.w; }
    else { uint2 v = lds2(base + i * 256 + lane * 8); w[2 * i] = v.x; w[2 * i + 1] = v.y; }
  }
}
// The 32 bits from bit `at` of a stream on; `at` is a constant once loops are unrolled.
template <int N> DI u32 bits_from(const u32 (&w)[N], int at) {
  const int i = at >> 5, s = at & 31;
  return s == 0 ? w[i] : __funnelshift_l(i + 1 < N ? w[i + 1] : 0u, w[i], s);
}
// Register and bits of one token's run, most significant first. `first`: this lane has the token's first run, which begins in `start`.
template <class R> DI void open_run(u32 (&run)[R::HELD], const u32 (&w)[R::WORDS], int token, int before, bool first, u32 start) {
  const int begin = token * R::BITS, end = begin + R::BITS;
  const u32 last = (end & 31) == 0 || (end & 31) >= REGISTER ? w[(end - 1) >> 5] >> ((32 - end) & 31) : bits_from(w, end - REGISTER) >> (32 - REGISTER);
  const u32 left = __shfl_sync(~0u, last, before), held = first ? start : left;
  run[0] = held << (32 - REGISTER) | bits_from(w, begin) >> REGISTER;
#pragma unroll
  for (int k = 1; k < R::HELD; k++) run[k] = bits_from(w, begin + 32 * k - REGISTER);
}
// Twice the number of the entry of coordinates 2 i and 2 i + 1 of a run, above which other bits lie.
template <class R> DI u32 window(const u32 (&run)[R::HELD], int i) {
  constexpr int BITS = pair_bits(R::F);
  const int end = i * BITS + REGISTER + BITS, word = (end - 1) >> 5, shift = (word + 1) * 32 - end - 1;
  const bool apart = end - REGISTER - BITS < word * 32;
  return shift < 0 ? run[word] << 1 : apart ? __funnelshift_r(run[word], run[word > 0 ? word - 1 : 0], shift) : run[word] >> shift;
}
template <class R> constexpr u32 WINDOW = ((1u << (REGISTER + pair_bits(R::F))) - 1) << 1;
// Levels + ZERO of coordinates 2 i and 2 i + 1 of a run, in two bytes.
template <class R> DI u32 level_pair(const u32 (&run)[R::HELD], int i, const Lookup& table) {
  constexpr u32 COPIES = copies_of(R::F), LOW = ROW / COPIES - 2; const u32 x = window<R>(run, i); u32 at;
  asm("mad.lo.u32 %0,%1,%2,%3;" : "=r"(at) : "r"(x & WINDOW<R> & ~LOW), "r"(table.copies), "r"((x & LOW) | table.at));
  u16 two; asm("ld.shared.u16 %0,[%1];" : "=h"(two) : "r"(at)); return two;
}
DI u32 start_of(const Levels& book, u32 header) { return book.a >> (header >> 6 & 3) * 8 & 63; }
DI u32 entry(uint4 scales, int i) { const u32 w = (&scales.x)[i >> 1]; return i & 1 ? w >> 16 : w & 0xffffu; }
DI float held_half(u32 two_entries) { return half_low(prmt(two_entries, 0, 0x4431)); }           // the upper bytes of two entries
DI void trellis_scales(float (&f)[8], uint4 scales) {
  const float unit = held_half(scales.x);
#pragma unroll
  for (int i = 0; i < 8; i++) f[i] = unit * (float)(entry(scales, i) & 63);
}
// Two bytes each of four tokens -> first bytes, second bytes.
DI void part_pairs(u32 (&o)[2], u32 a, u32 b, u32 c, u32 d) {
  const u32 x = prmt(a, b, 0x5140), y = prmt(c, d, 0x5140); o[0] = prmt(x, y, 0x5410); o[1] = prmt(x, y, 0x7632);
}
