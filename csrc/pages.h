// Whole pages outside attention: the engine's byte order and the canonical one, and the vectors that a page stands for.
#ifndef KVFOLD_PAGES_OF_H
#define KVFOLD_PAGES_OF_H

#include <cstdint>

#include "levels/level.h"

namespace kvfold {

// A permutation of bytes and bits, and its inverse. Both take Layout::row_bytes.
void to_canonical(const kvf_format& format, const std::uint8_t* row, std::uint8_t* canonical);
void from_canonical(const kvf_format& format, const std::uint8_t* canonical, std::uint8_t* row);

// Reconstructed keys and values, [kv_heads, 128, head_dim] each.
void unfold(const kvf_format& format, const Level& level, const std::uint8_t* row, float* keys, float* values);

}  // namespace kvfold
#endif
