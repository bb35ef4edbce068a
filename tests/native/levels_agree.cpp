// Every level this machine has against the scalar one, through the C interface: same bytes when folding, in random trellis codes too,
// same attention within the rounding of queries and weights, over folded pages and over random trellis pages. Buffers end where an
// inaccessible page begins, so that a read past the end dies at once.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../csrc/format.h"
#include "../../csrc/kvfold_trellis.h"

#if defined(_WIN32)
#include <malloc.h>
#else
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace {

// Levels round weights relative to blocks of different sizes; each is promised to be this close to float64.
constexpr double kTolerance = 5e-4;
constexpr int kPages = 5, kTokens = 128, kSinks = 4, kRecent = 9;

class Guarded {  // `bytes` that end at an inaccessible page; the start is 64-byte aligned if bytes is a multiple of 64
 public:
  explicit Guarded(std::size_t bytes) {
#if defined(_WIN32)
    data_ = static_cast<unsigned char*>(_aligned_malloc(bytes, 64));
#else
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE)), whole = (bytes + page - 1) / page * page;
    auto* base = static_cast<unsigned char*>(mmap(nullptr, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0));
    if (base == MAP_FAILED || mprotect(base + whole, page, PROT_NONE) != 0) std::abort();
    data_ = base + (whole - bytes);
#endif
    std::memset(data_, 0xAA, bytes);
  }
  unsigned char* bytes() const { return data_; }
  float* floats() const { return reinterpret_cast<float*>(data_); }

 private:
  unsigned char* data_;
};

unsigned state = 12345;
float uniform() {
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(state >> 8) / 16777216.0f;
}
float gaussian() { return std::sqrt(-2 * std::log(1 - uniform())) * std::cos(6.2831853f * uniform()); }

Guarded vectors(std::size_t count) {
  Guarded out(count * sizeof(float));
  for (std::size_t i = 0; i < count; ++i) out.floats()[i] = gaussian();
  return out;
}

kvf_side side(int bits, int rule, int searches) {
  kvf_side out = {};
  out.bits = bits;
  out.scale_rule = rule;
  out.searches = searches;
  out.step = 2.8f / 63;
  const int count = 1 << bits;
  for (int i = 0; i < count; ++i) out.levels[i] = static_cast<signed char>(std::lrint((2.0 * i / (count - 1) - 1) * 63));
  for (int i = 0; i + 1 < count; ++i) out.thresholds[i] = out.step * 0.5f * static_cast<float>(out.levels[i] + out.levels[i + 1]);
  return out;
}

unsigned bits_at_random(int bits) { return static_cast<unsigned>(uniform() * static_cast<float>(1u << bits)); }
unsigned reversed(unsigned x, int bits) {
  unsigned out = 0;
  for (int i = 0; i < bits; ++i) out |= (x >> i & 1) << (bits - 1 - i);
  return out;
}
unsigned parity(unsigned x) {
  unsigned out = 0;
  for (; x != 0; x >>= 1) out ^= x & 1;
  return out;
}

// A trellis code of random masks and 2^index_bits levels.
struct Trellis {
  Trellis(int first, int second, int index_bits) {
    const int half = 1 << (index_bits - 1);
    for (int i = 0; i < half; ++i) {
      reader.levels[half + i] = static_cast<signed char>(1 + bits_at_random(6) % 63);
      reader.levels[half - 1 - i] = static_cast<signed char>(-reader.levels[half + i]);
    }
    const int widths[2] = {first, second};
    for (int phase = 0; phase < 2; ++phase) {
      reader.widths[phase] = widths[phase];
      for (int i = 0; i < index_bits; ++i) {
        masks[phase][i] = bits_at_random(6 + widths[phase]);
        reader.affine_low[phase] |= std::uint64_t{masks[phase][i] & 255} << (8 * (7 - i));
        reader.affine_high[phase] |= std::uint64_t{masks[phase][i] >> 8} << (8 * (7 - i));
      }
    }
    const unsigned states[4] = {0, 11, 37, 52};
    for (int i = 0; i < 4; ++i) {
      reader.starts[i] = static_cast<unsigned char>(reversed(states[i], 6));
      search.starts |= std::uint64_t{1} << states[i];
    }
    search.period = first == second ? 1 : 2;
    search.levels = 1 << index_bits;
    search.grid = 3;
    search.clip = 240;
    search.shift = 2;
    search.gain = 70;
    for (int i = 0; i < search.levels; ++i) search.level[i] = static_cast<short>(3 * reader.levels[i]);
    for (int phase = 0; phase < 2; ++phase) {
      search.width[phase] = widths[phase];
      for (unsigned w = 0; w < 64u << widths[phase]; ++w) indices[phase].push_back(index(phase, reversed(w, 6 + widths[phase])));
      search.index[phase] = indices[phase].data();
    }
    for (unsigned w = 0; w < 1u << (6 + first + second); ++w) {
      pairs.push_back(level(0, w & ((64u << first) - 1)));
      pairs.push_back(level(1, w >> first));
    }
    reader.pairs = pairs.data();
  }
  Trellis(const Trellis&) = delete;
  Trellis& operator=(const Trellis&) = delete;

  // Of a window as it lies in a stream, the oldest bit lowest.
  unsigned char index(int phase, unsigned window) const {
    unsigned out = 0;
    for (int i = 0; i < 6; ++i) out |= parity(window & masks[phase][i]) << i;
    return static_cast<unsigned char>(out);
  }
  signed char level(int phase, unsigned window) const { return reader.levels[index(phase, window)]; }

  kvf_trellis_reader reader = {};
  kvf_trellis search = {};
  std::vector<unsigned char> indices[2];
  unsigned masks[2][6] = {};
  std::vector<signed char> pairs;
};

int failures = 0;
void check(bool good, const char* what, const char* level, int dim, const char* bits, double error = 0) {
  if (good) return;
  ++failures;
  std::printf("FAILED %s: level %s, head_dim %d, %s, error %.2e\n", what, level, dim, bits, error);
}

struct Case {
  int dim, heads, group, new_tokens;
  kvf_format format = {};
  std::vector<float> signs;
  Guarded keys, values, query, recent;
  std::vector<Guarded> rows;
  std::vector<std::uint64_t> addresses;

  Case(int d, int h, int g, int n, const kvf_side& key, const kvf_side& value)
      : dim(d), heads(h), group(g), new_tokens(n), signs(2u * h * d), keys(vectors(std::size_t{kPages} * h * kTokens * d)),
        values(vectors(std::size_t{kPages} * h * kTokens * d)), query(vectors(std::size_t(h) * g * n * d)),
        recent(vectors(std::size_t(h) * (kRecent + n + kSinks) * d)) {
    for (auto& s : signs) s = uniform() < 0.5f ? -1.0f : 1.0f;
    format = {d, h, kSinks, 1, key, value, signs.data(), signs.data() + h * d};
    for (int p = 0; p < kPages; ++p) {
      rows.emplace_back(static_cast<std::size_t>(kvf_row_bytes(&format)));
      addresses.push_back(reinterpret_cast<std::uint64_t>(rows.back().bytes()));
    }
  }

  std::vector<unsigned char> fold(int level) {
    const std::int64_t head = std::int64_t{kTokens} * dim;
    const kvf_vectors k{keys.bytes(), heads * head, head, dim}, v{values.bytes(), heads * head, head, dim};
    if (kvf_fold(&format, level, 2, KVF_FLOAT32, k, v, kPages, 1, addresses.data()) != KVF_OK) return {};
    std::vector<unsigned char> all;
    for (auto& row : rows) all.insert(all.end(), row.bytes(), row.bytes() + kvf_row_bytes(&format));
    return all;
  }

  // Pages of any codes at all; float16 scales are numbers that suit levels of up to 63.
  void randomise() const {
    const kvfold::Layout layout(format);
    for (auto& row : rows) {
      for (std::size_t i = 0; i < layout.row_bytes(); ++i) row.bytes()[i] = static_cast<unsigned char>(bits_at_random(8));
      const auto set = [&row](std::size_t at, std::size_t count, unsigned char high) {  // to powers of two
        for (std::size_t i = 0; i < count; ++i) {
          row.bytes()[at + 2 * i] = 0;
          row.bytes()[at + 2 * i + 1] = high;
        }
      };
      for (int h = 0; h < heads; ++h) {
        set(layout.mean_scales(h), 2, 0x1C);
        if (format.key.trellis == nullptr) set(layout.key_scales(h), kTokens, 0x28);
        else set(layout.key_unit(h), 1, 0x14);
        if (format.value.trellis == nullptr) set(layout.value_scales(h), kTokens, 0x28);
        else set(layout.value_unit(h), 1, 0x14);
      }
    }
  }

  std::vector<float> attend(int level) const {
    const auto part = [&](int first, int tokens) {
      return kvf_vectors{recent.floats() + std::int64_t{first} * heads * dim, 0, std::int64_t{tokens} * dim, dim};
    };
    const kvf_vectors old = part(0, kRecent), sinks = part(kRecent, kSinks), fresh = part(kRecent + kSinks, new_tokens);
    const kvf_sequence sequence{addresses.data(), kPages * kTokens - 50, kRecent, 0, old, old, sinks, sinks, nullptr, 0, 0};
    std::vector<float> out(std::size_t(heads) * group * new_tokens * dim);
    const kvf_vectors q{query.bytes(), 0, std::int64_t{new_tokens} * dim, dim};
    const kvf_attend_request request{&format, &sequence, 1, heads * group, new_tokens, KVF_FLOAT32, KVF_FLOAT32, level, 2,
                                     0.3f,    q,         fresh, fresh,       out.data()};
    if (kvf_attend(&request) != KVF_OK) return {};
    return out;
  }
};

void compare_attention(const Case& c, int scalar, const char* bits) {
  const auto wanted = c.attend(scalar);
  for (int level = 0; level < scalar; ++level) {
    if (kvf_level_reason(level)[0] != '\0') continue;
    const auto got = c.attend(level);
    double error = 0, norm = 0;
    for (std::size_t i = 0; i < wanted.size(); ++i) {
      error += std::pow(double{got[i]} - wanted[i], 2);
      norm += std::pow(double{wanted[i]}, 2);
    }
    check(std::sqrt(error / norm) < kTolerance, "attention", kvf_level_name(level), c.dim, bits, std::sqrt(error / norm));
  }
}

void compare_bytes(Case& c, int scalar, const char* bits) {
  const auto bytes = c.fold(scalar);
  check(!bytes.empty(), "fold", "scalar", c.dim, bits);
  for (int level = 0; level < scalar; ++level)
    if (kvf_level_reason(level)[0] == '\0') check(c.fold(level) == bytes, "bytes", kvf_level_name(level), c.dim, bits);
}

void compare_orders(const Case& c, int scalar, const char* bits) {
  std::vector<unsigned char> canonical(kvf_row_bytes(&c.format)), back(kvf_row_bytes(&c.format));
  kvf_to_canonical(&c.format, c.rows[0].bytes(), canonical.data());
  kvf_from_canonical(&c.format, canonical.data(), back.data());
  check(std::memcmp(back.data(), c.rows[0].bytes(), kvfold::Layout(c.format).used_bytes()) == 0, "bijection", "all", c.dim, bits);
  std::vector<float> keys(std::size_t(c.heads) * kTokens * c.dim), values(keys.size());
  check(kvf_unfold(&c.format, scalar, c.rows[0].bytes(), keys.data(), values.data()) == KVF_OK, "unfold", "scalar", c.dim, bits);
}

}  // namespace

int main() {
  const int scalar = kvf_level_count() - 1;
  for (int i = 0; i <= scalar; ++i) std::printf("level %s: %s\n", kvf_level_name(i), *kvf_level_reason(i) ? kvf_level_reason(i) : "runs");
  const struct { int key, value; const char* name; } bits[] = {{4, 4, "4 bits"}, {3, 2, "3 and 2 bits"}, {2, 3, "2 and 3 bits"}};
  const int shapes[][2] = {{1, 1}, {3, 1}, {4, 2}, {8, 5}, {16, 9}};  // query group, new tokens
  for (int dim : {64, 96, 128, 256})
    for (const auto& b : bits)
      for (const auto& s : shapes) {
        Case c(dim, 3, s[0], s[1], side(b.key, KVF_SCALE_UNBIASED, 3), side(b.value, KVF_SCALE_LEAST_SQUARES, 1));
        compare_bytes(c, scalar, b.name);
        compare_attention(c, scalar, b.name);
        compare_orders(c, scalar, b.name);
      }
  const struct { int first, second, index_bits; const char* name; } codes[] = {
      {1, 1, 4, "trellis 1"},   {1, 2, 4, "trellis 1.5"}, {2, 2, 4, "trellis 2"},           {2, 3, 5, "trellis 2.5"},
      {3, 3, 6, "trellis 3"},   {3, 4, 6, "trellis 3.5"}, {2, 2, 6, "trellis 2, 64 levels"}, {3, 4, 4, "trellis 3.5, 16 levels"}};
  for (int dim : {64, 128, 256})
    for (const auto& code : codes)
      for (const auto& s : {shapes[1], shapes[dim == 64 ? 4 : 2]}) {
        const Trellis keys(code.first, code.second, code.index_bits), values(code.first, code.second, code.index_bits);
        kvf_side key = {}, value = {};
        key.trellis = &keys.reader;
        value.trellis = &values.reader;
        key.search = &keys.search;
        value.search = &values.search;
        key.scale_rule = KVF_SCALE_UNBIASED;
        value.scale_rule = KVF_SCALE_LEAST_SQUARES;
        key.searches = 1;
        value.searches = 3;
        Case c(dim, 3, s[0], s[1], key, value);
        if (s == shapes[1]) compare_bytes(c, scalar, code.name);
        c.randomise();
        compare_attention(c, scalar, code.name);
        compare_orders(c, scalar, code.name);
        for (int group : {1, 2}) {  // rows that readers of streams have loops of their own for
          if (s != shapes[1]) continue;
          Case few(dim, 3, group, 1, key, value);
          few.randomise();
          compare_attention(few, scalar, code.name);
        }
      }
  std::printf(failures == 0 ? "all levels agree\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
