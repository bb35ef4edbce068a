// Codes <-> the engine's planes, the canonical planes, and the permutation between both. Plain integer code: format.h has the picture.
// Included by every level (fold packs with it), hence in an anonymous namespace.
#ifndef KVFOLD_PACK_H
#define KVFOLD_PACK_H

#include <cstdint>
#include <cstring>

#include "format.h"

namespace kvfold {
namespace {

// Calls visit(width, shift) for each plane of a code, lowest bits first: 4 -> (4, 0), 3 -> (2, 0) (1, 2), 2 -> (2, 0).
template <class Visit>
inline void for_planes(int bits, const Visit& visit) {
  int shift = 0;
  for (int width = 4; width >= 1; width /= 2)
    if ((bits & width) != 0) {
      visit(width, shift);
      shift += width;
    }
}

inline std::uint32_t load_word(const std::uint8_t* p) {
  std::uint32_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

// Four codes per word: the same plane of each, moved to field f.
template <int Width, int Shift>
inline std::uint32_t field_of(std::uint32_t word, int field) {
  constexpr std::uint32_t kMask = 0x01010101u * ((1u << Width) - 1u);
  return ((word >> Shift) & kMask) << (Width * field);
}

// One plane of a group, `lines` lines of 64 bytes. Widths are template arguments so that compilers vectorise.
template <int Width, int Shift>
inline void pack_plane(const std::uint8_t* quads, int lines, std::uint8_t* out) {
  for (int i = 0; i < 16 * lines; ++i) {
    std::uint32_t word = 0;
    for (int f = 0; f < 8 / Width; ++f) word |= field_of<Width, Shift>(load_word(quads + 4 * (i + f * 16 * lines)), f);
    std::memcpy(out + 4 * i, &word, sizeof word);
  }
}

// Codes of one side of a page, as [group][quad][lane][member of the quad], one a byte -> its planes.
inline void pack_groups(const std::uint8_t* codes, int groups, int quads, int bits, std::uint8_t* out) {
  const std::size_t bytes = Layout::group_bytes(quads, bits);
  for (int g = 0; g < groups; ++g, codes += 64 * quads, out += bytes) {
    if (bits == 4) {
      pack_plane<4, 0>(codes, quads / 2, out);
    } else {
      pack_plane<2, 0>(codes, quads / 4, out);
      if (bits == 3) pack_plane<1, 2>(codes, quads / 8, out + bytes / 3 * 2);
    }
  }
}

inline void pack_keys(const std::uint8_t* codes, int dim, int bits, std::uint8_t* out) {
  alignas(64) std::uint8_t quads[kPageTokens * kMaxDim];
  for (int t = 0; t < kPageTokens; ++t, codes += dim)
    for (int j = 0; j < dim; j += 4)
      std::memcpy(quads + t / kLanes * kLanes * dim + j / 4 * 64 + t % kLanes * 4, codes + j, 4);
  pack_groups(quads, kTokenGroups, dim / 4, bits, out);
}

inline void pack_values(const std::uint8_t* codes, int dim, int bits, std::uint8_t* out) {
  alignas(64) std::uint8_t quads[kPageTokens * kMaxDim];
  for (int t = 0; t < kPageTokens; ++t)
    for (int j = 0; j < dim; ++j)
      quads[j / kLanes * kLanes * kPageTokens + t / 4 * 64 + j % kLanes * 4 + t % 4] = codes[t * dim + j];
  pack_groups(quads, dim / kLanes, kTokenQuads, bits, out);
}

// The byte of the engine's codes that holds (lane, i) of a quad, and the position of its plane's bits within the byte.
template <class Visit>
inline void for_group_codes(int quads, int bits, const Visit& visit) {
  int offset = 0;
  for_planes(bits, [&](int width, int shift) {
    const int lines = quads * width / 8;
    for (int quad = 0; quad < quads; ++quad)
      for (int lane = 0; lane < kLanes; ++lane)
        for (int i = 0; i < 4; ++i)
          visit(quad, lane, i, offset + 64 * (quad % lines) + 4 * lane + i, width * (quad / lines), (1 << width) - 1, shift);
    offset += 64 * lines;
  });
}

inline void unpack_keys(const std::uint8_t* in, int dim, int bits, std::uint8_t* codes) {
  std::memset(codes, 0, static_cast<std::size_t>(kPageTokens) * dim);
  for (int group = 0; group < kTokenGroups; ++group)
    for_group_codes(dim / 4, bits, [&](int quad, int lane, int i, int byte, int position, int mask, int shift) {
      const int code = (in[group * Layout::group_bytes(dim / 4, bits) + byte] >> position) & mask;
      codes[(group * kLanes + lane) * dim + 4 * quad + i] |= static_cast<std::uint8_t>(code << shift);
    });
}

inline void unpack_values(const std::uint8_t* in, int dim, int bits, std::uint8_t* codes) {
  std::memset(codes, 0, static_cast<std::size_t>(kPageTokens) * dim);
  for (int group = 0; group < dim / kLanes; ++group)
    for_group_codes(kTokenQuads, bits, [&](int quad, int lane, int i, int byte, int position, int mask, int shift) {
      const int code = (in[group * Layout::group_bytes(kTokenQuads, bits) + byte] >> position) & mask;
      codes[(4 * quad + i) * dim + group * kLanes + lane] |= static_cast<std::uint8_t>(code << shift);
    });
}

// Canonical planes: per plane [128 tokens][dim * width / 8 bytes], value j at byte j * width / 8, bit j * width % 8.
inline void pack_canonical(const std::uint8_t* codes, int dim, int bits, std::uint8_t* out) {
  std::memset(out, 0, std::size_t{16} * dim * bits);
  for_planes(bits, [&](int width, int shift) {
    for (int t = 0; t < kPageTokens; ++t, out += dim * width / 8)
      for (int j = 0; j < dim; ++j) {
        const int code = (codes[t * dim + j] >> shift) & ((1 << width) - 1);
        out[j * width / 8] |= static_cast<std::uint8_t>(code << (j * width % 8));
      }
  });
}

inline void unpack_canonical(const std::uint8_t* in, int dim, int bits, std::uint8_t* codes) {
  std::memset(codes, 0, static_cast<std::size_t>(kPageTokens) * dim);
  for_planes(bits, [&](int width, int shift) {
    for (int t = 0; t < kPageTokens; ++t, in += dim * width / 8)
      for (int j = 0; j < dim; ++j) {
        const int code = (in[j * width / 8] >> (j * width % 8)) & ((1 << width) - 1);
        codes[t * dim + j] |= static_cast<std::uint8_t>(code << shift);
      }
  });
}

}  // namespace
}  // namespace kvfold
#endif
