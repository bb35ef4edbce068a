#include "pages.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "half.h"
#include "pack.h"
#include "streams.h"

namespace kvfold {
namespace {

// One side of one head: where it lies in a row, and how its codes are ordered there.
struct Side {
  Side(const kvf_format& format, const Layout& layout, std::size_t head, bool of_keys)
      : side(of_keys ? format.key : format.value),
        dim(format.head_dim),
        keys(of_keys),
        codes(of_keys ? layout.key_codes(head) : layout.value_codes(head)),
        scales(of_keys ? layout.key_scales(head) : layout.value_scales(head)),
        unit(of_keys ? layout.key_unit(head) : layout.value_unit(head)),
        code_bytes(of_keys ? layout.key_bytes : layout.value_bytes),
        scale_bytes(of_keys ? layout.key_scale_bytes : layout.value_scale_bytes),
        unit_bytes(of_keys ? layout.key_unit_bytes : layout.value_unit_bytes) {}

  // Codes, or symbols of a trellis code, [128][dim].
  void unpack(const std::uint8_t* row, std::uint8_t* out) const {
    if (side.trellis != nullptr) return unpack_streams(row + codes, dim, *side.trellis, keys, out);
    keys ? unpack_keys(row + codes, dim, side.bits, out) : unpack_values(row + codes, dim, side.bits, out);
  }
  void pack(const std::uint8_t* in, std::uint8_t* row) const {
    if (side.trellis != nullptr) return pack_streams(in, dim, *side.trellis, keys, row + codes);
    keys ? pack_keys(in, dim, side.bits, row + codes) : pack_values(in, dim, side.bits, row + codes);
  }

  // The side's fields in canonical order; return where the next ones are.
  std::uint8_t* to_canonical(const std::uint8_t* row, std::uint8_t* buffer, std::uint8_t* out) const {
    unpack(row, buffer);
    if (side.trellis != nullptr)
      pack_canonical_symbols(buffer, dim, *side.trellis, out);
    else
      pack_canonical(buffer, dim, side.bits, out);
    std::memcpy(out += code_bytes, row + scales, scale_bytes);
    std::memcpy(out += scale_bytes, row + unit, unit_bytes);
    return out + unit_bytes;
  }
  const std::uint8_t* from_canonical(const std::uint8_t* in, std::uint8_t* buffer, std::uint8_t* row) const {
    if (side.trellis != nullptr)
      unpack_canonical_symbols(in, dim, *side.trellis, buffer);
    else
      unpack_canonical(in, dim, side.bits, buffer);
    pack(buffer, row);
    std::memcpy(row + scales, in += code_bytes, scale_bytes);
    std::memcpy(row + unit, in += scale_bytes, unit_bytes);
    return in + unit_bytes;
  }

  // scale * L of every token, [128][dim].
  void read(const std::uint8_t* row, std::uint8_t* buffer, float* out) const {
    if (side.trellis == nullptr) unpack(row, buffer);
    for (int t = 0; t < kPageTokens; ++t, out += dim) {
      if (side.trellis != nullptr) {
        const std::uint8_t header = row[scales + t];
        const float scale = half(row + unit) * static_cast<float>(header & kScaleCode);
        read_levels(row + codes, dim, *side.trellis, keys, t, header,
                    [&](int j, std::int8_t level) { out[j] = scale * static_cast<float>(level); });
        continue;
      }
      const float scale = half(row + scales + 2 * t);
      for (int j = 0; j < dim; ++j) out[j] = scale * static_cast<float>(side.levels[buffer[t * dim + j]]);
    }
  }

  static float half(const std::uint8_t* bytes) {
    std::uint16_t value;
    std::memcpy(&value, bytes, sizeof value);
    return half_to_float(value);
  }

  const kvf_side& side;
  const int dim;
  const bool keys;
  const std::size_t codes, scales, unit, code_bytes, scale_bytes, unit_bytes;
};

// Inverse rotation of [128][dim], in place.
void rotate_back(const Level& level, const float* signs, int dim, float* vectors) {
  const float norm = 1.0f / std::sqrt(static_cast<float>(dim));
  alignas(64) float vector[kMaxDim];
  for (int t = 0; t < kPageTokens; ++t, vectors += dim) {
    for (int j = 0; j < dim; ++j) vector[j] = vectors[j] * norm;
    level.hadamard(vector, dim);
    for (int j = 0; j < dim; ++j) vectors[j] = vector[j] * signs[j];
  }
}

std::vector<std::uint8_t> page_of_codes(const Layout& layout) {
  return std::vector<std::uint8_t>(std::size_t{kPageTokens} * layout.dim);
}

}  // namespace

void to_canonical(const kvf_format& format, const std::uint8_t* row, std::uint8_t* canonical) {
  const Layout layout(format);
  std::vector<std::uint8_t> buffer = page_of_codes(layout);
  std::memset(canonical, 0, layout.row_bytes());
  for (std::size_t h = 0; h < layout.heads; ++h) {
    std::uint8_t* out = Side(format, layout, h, true).to_canonical(row, buffer.data(), canonical + h * layout.head_bytes);
    out = Side(format, layout, h, false).to_canonical(row, buffer.data(), out);
    std::memcpy(out, row + layout.means(h), layout.mean_bytes);
    std::memcpy(out + layout.mean_bytes, row + layout.mean_scales(h), layout.mean_scale_bytes);
  }
}

void from_canonical(const kvf_format& format, const std::uint8_t* canonical, std::uint8_t* row) {
  const Layout layout(format);
  std::vector<std::uint8_t> buffer = page_of_codes(layout);
  std::memset(row, 0, layout.row_bytes());
  for (std::size_t h = 0; h < layout.heads; ++h) {
    const std::uint8_t* in = Side(format, layout, h, true).from_canonical(canonical + h * layout.head_bytes, buffer.data(), row);
    in = Side(format, layout, h, false).from_canonical(in, buffer.data(), row);
    std::memcpy(row + layout.means(h), in, layout.mean_bytes);
    std::memcpy(row + layout.mean_scales(h), in + layout.mean_bytes, layout.mean_scale_bytes);
  }
}

void unfold(const kvf_format& format, const Level& level, const std::uint8_t* row, float* keys, float* values) {
  const Layout layout(format);
  const int dim = format.head_dim;
  std::vector<std::uint8_t> buffer = page_of_codes(layout);
  for (std::size_t h = 0; h < layout.heads; ++h, keys += kPageTokens * dim, values += kPageTokens * dim) {
    Side(format, layout, h, true).read(row, buffer.data(), keys);
    rotate_back(level, format.key_signs + h * layout.dim, dim, keys);
    Side(format, layout, h, false).read(row, buffer.data(), values);
    rotate_back(level, format.value_signs + h * layout.dim, dim, values);
    if (format.centre == 0) continue;
    const auto* means = reinterpret_cast<const std::int8_t*>(row + layout.means(h));
    for (int t = 0; t < kPageTokens; ++t) {
      const int which = t / kMeanTokens;
      const float scale = Side::half(row + layout.mean_scales(h) + 2 * which);
      for (int j = 0; j < dim; ++j) keys[t * dim + j] += scale * static_cast<float>(means[which * dim + j]);
    }
  }
}

}  // namespace kvfold
