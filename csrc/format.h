// Where everything lies in a page row. The only arithmetic about the engine's own byte order.
//
// A row holds 128 tokens of all KV heads of one layer:
//   per head: [means of both halves of the page int8 x 2D][K scales fp16 x128][K codes][V scales fp16 x128][V codes]
//   then the scales of the means, fp16 x2 per head, the units of trellis scales, fp16 per head and side, and zeros.
// A side in trellis codes has one header byte per token in place of the scale.
// Attention reads a row from its first byte to its last, which is what hardware prefetchers and memory like best (a walk head by head
// over many rows reached three quarters of the bandwidth). Byte count equals the canonical one (per head: codes, scales, means, padded
// to 8); putting the odd-sized part last keeps every code line on a 64-byte boundary of the row.
//
// Codes. Both sides use one shape: groups of 16 lanes by `quads` of 4, a line of 64 bytes being 16 lanes x 4.
//   keys:   8 groups of 16 tokens,    quads run over coordinates (D / 4)
//   values: D/16 groups of 16 coords, quads run over tokens      (32)
// A plane of width w packs 8/w quads into a line: field f of line s is quad s + f * lines, lines = quads * w / 8. Three bits are a
// 2-bit plane (low bits) followed by a 1-bit plane, group by group.
//
// Trellis codes. A vector's bits are one stream in the order in which they enter the register; 16 coordinates are a segment of it, of
// widths[0] + widths[1] bytes. Line c of a run of as many lines holds byte c of 64 segments, in the order in which dot products take numbers:
//   keys:   8 groups of 16 tokens by D / 64 runs; a lane is a token, its four bytes are segments that follow each other
//   values: 128 / (4 Q) runs of 4 Q tokens, Q = 256 / D; lane Q s + q is segment s of four tokens, the q-th of the run
// So that whatever maps windows to levels works on whole lines, and its results need not be moved.
#ifndef KVFOLD_FORMAT_H
#define KVFOLD_FORMAT_H

#include <cstddef>
#include <cstdint>

#include "kvfold_cpu.h"

namespace kvfold {

constexpr int kPageTokens = 128;
constexpr int kMeanTokens = 64;  // half a page shares a mean key
constexpr int kMeans = kPageTokens / kMeanTokens;
constexpr int kLanes = 16;
constexpr int kMaxDim = 256;
constexpr int kTokenQuads = kPageTokens / 4;
constexpr int kTokenGroups = kPageTokens / kLanes;

inline bool supported_side(const kvf_side& side) {
  if (side.trellis == nullptr) return side.bits >= 2 && side.bits <= 4 && (side.searches == 1 || side.searches == 3);
  const std::int32_t first = side.trellis->widths[0], second = side.trellis->widths[1];
  return (first == second || first + 1 == second) && first >= 1 && first + second <= 7 && side.trellis->pairs != nullptr;
}

// Bits of two codes that follow each other in a vector.
inline std::size_t pair_bits(const kvf_side& side) {
  if (side.trellis == nullptr) return static_cast<std::size_t>(2 * side.bits);
  return static_cast<std::size_t>(side.trellis->widths[0] + side.trellis->widths[1]);
}

inline bool supported(const kvf_format& format) {
  const bool streams = format.key.trellis != nullptr || format.value.trellis != nullptr;  // of whole words per 64 coordinates
  const bool dim = format.head_dim == 64 || (format.head_dim == 96 && !streams) || format.head_dim == 128 || format.head_dim == 256;
  return dim && format.kv_heads > 0 && format.sinks >= 0 && format.sinks <= kPageTokens && supported_side(format.key) &&
         supported_side(format.value);
}

struct Layout {
  explicit Layout(const kvf_format& format)
      : dim(format.head_dim),
        heads(format.kv_heads),
        key_bytes(std::size_t{8} * dim * pair_bits(format.key)),
        value_bytes(std::size_t{8} * dim * pair_bits(format.value)),
        key_scale_bytes(scale_bytes(format.key)),
        value_scale_bytes(scale_bytes(format.value)),
        mean_bytes(format.centre != 0 ? kMeans * dim : 0),
        mean_scale_bytes(format.centre != 0 ? 2 * kMeans : 0),
        key_unit_bytes(unit_bytes(format.key)),
        value_unit_bytes(unit_bytes(format.value)),
        head_bytes(padded(head_stride() + mean_scale_bytes + key_unit_bytes + value_unit_bytes)) {}

  std::size_t row_bytes() const { return heads * head_bytes; }
  std::size_t means(std::size_t head) const { return head * head_stride(); }
  std::size_t key_scales(std::size_t head) const { return means(head) + mean_bytes; }
  std::size_t key_codes(std::size_t head) const { return key_scales(head) + key_scale_bytes; }
  std::size_t value_scales(std::size_t head) const { return key_codes(head) + key_bytes; }
  std::size_t value_codes(std::size_t head) const { return value_scales(head) + value_scale_bytes; }
  std::size_t mean_scales(std::size_t head) const { return means(heads) + mean_scale_bytes * head; }
  std::size_t key_unit(std::size_t head) const { return mean_scales(heads) + key_unit_bytes * head; }
  std::size_t value_unit(std::size_t head) const { return key_unit(heads) + value_unit_bytes * head; }
  std::size_t used_bytes() const { return value_unit(heads); }
  // Bytes of one group of 16 lanes.
  static std::size_t group_bytes(int quads, int bits) { return std::size_t{8} * quads * bits; }

  std::size_t dim, heads, key_bytes, value_bytes, key_scale_bytes, value_scale_bytes, mean_bytes, mean_scale_bytes, key_unit_bytes,
      value_unit_bytes, head_bytes;

 private:
  std::size_t head_stride() const { return mean_bytes + key_scale_bytes + value_scale_bytes + key_bytes + value_bytes; }
  static std::size_t scale_bytes(const kvf_side& side) { return std::size_t{kPageTokens} * (side.trellis == nullptr ? 2 : 1); }
  static std::size_t unit_bytes(const kvf_side& side) { return side.trellis == nullptr ? 0 : 2; }
  static std::size_t padded(std::size_t bytes) { return (bytes + 7) / 8 * 8; }
};

}  // namespace kvfold
#endif
