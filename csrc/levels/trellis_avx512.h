// Trellis codes with AVX-512 VBMI and GFNI.
//
// The map from window to index is linear over bits: an index is a matrix times the window's first byte, exclusive or another times the next
// (gf2p8affineqb), rarely a third. Where indices have four bits, two windows share a byte and its matrices. For up to kStreamRows query rows
// levels go from there to the products at once, never through memory, two windows or groups of tokens side by side as in simd_avx512.h.
#ifndef KVFOLD_TRELLIS_AVX512_H
#define KVFOLD_TRELLIS_AVX512_H

#include <immintrin.h>

#include <algorithm>

#include "simd_avx512.h"
#include "trellis_runs.h"

namespace kvfold {
namespace {

template <>
class TrellisReader<SimdAvx512> : public RunsReader<TrellisReader<SimdAvx512>> {
  using Reg = __m512i;

 public:
  static constexpr int kUnpacked = kIndexBits, kBytes = 64;
  static constexpr int kStreamRows = 4;

  TrellisReader(const kvf_format& f, bool keys, int)
      : RunsReader(keys ? *f.key.trellis : *f.value.trellis, f.head_dim), paired(trellis_index_bits(code) == 4) {
    for (int n = 0; n < kSegment / 2; ++n) windows[n] = two_windows(n);
  }

  static Reg load(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
  static void store(std::uint8_t* p, Reg a) { _mm512_storeu_si512(p, a); }
  static Reg find(const std::uint8_t* table, Reg index) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(table))), index);
  }
  static Reg top_two(Reg bytes) { return _mm512_and_si512(_mm512_srli_epi16(bytes, 6), _mm512_set1_epi8(3)); }
  static Reg evens(Reg a, Reg b) { return pick<0x88>(a, b); }
  static Reg odds(Reg a, Reg b) { return pick<0xDD>(a, b); }

  template <class Sink>
  void run(const std::uint8_t* lines, const std::uint8_t* before, Sink sink) const {
    for (int i = 0; i < run_bytes; i += 64) SimdAvx512::prefetch_codes(lines + i);
    for (int n = 0; n < 4; ++n) {
      Reg four[4];
      unroll<2>([&](auto i) KVF_INLINE_LAMBDA {
        const Windows& both = windows[2 * n + i];
        if (both.simple)
          paired ? indices<true, true>(both, lines, before, four + 2 * i) : indices<true, false>(both, lines, before, four + 2 * i);
        else
          paired ? indices<false, true>(both, lines, before, four + 2 * i) : indices<false, false>(both, lines, before, four + 2 * i);
      });
      sink(0, n, four);
    }
  }

  // How many quads of tokens a run of values has, for which weights are to be in the order of store_quads<Quads>.
  static int value_quads(int dim) { return kMaxDim / dim; }

  // `starts` of a page, for key_sums().
  void open_keys(const std::uint8_t* headers, std::uint8_t* starts_of) const { find_starts(headers, starts_of); }

  // Products of keys of 2 x 16 tokens, whose codes are at `codes` and whose starts are at `first`, with query rows: out as of dot().
  void key_sums(int rows, const std::uint8_t* codes, const std::uint8_t* first, const std::uint8_t* operand, const std::int32_t* sum,
                const std::uint8_t* table, Asking ask, std::int32_t* out) const {
    paired ? key_rows<true>(rows, codes, first, operand, sum, table, ask, out) : key_rows<false>(rows, codes, first, operand, sum, table, ask, out);
  }

  // What comes before the first byte of every segment of a page of values, [run][64].
  void open_values(const std::uint8_t* codes, const std::uint8_t* headers, std::uint8_t* before) const {
    alignas(64) std::uint8_t first[kPageTokens + 16];  // sixteen bytes are read where four may be wanted
    find_starts(headers, first);
    const int quads = value_quads(dim);
    const auto others = static_cast<__mmask16>(~0u << quads);
    const std::uint8_t* last = codes + run_bytes - 64 - 4 * quads;
    for (int quad = 0; quad < kTokenQuads; quad += quads, last += run_bytes, before += 64) {
      const Reg begin = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(first + 4 * quad)));
      _mm512_store_si512(before, _mm512_mask_loadu_epi32(begin, others, last));
    }
  }

  // Products of weights with the values of one part of the coordinates: 32 of them at head_dim 256, else 16; parts.ahead is not looked at.
  void value_sums(int rows, int part, const Parts& parts, const std::uint8_t* const* before, const std::uint8_t* operand,
                  const std::int32_t* sum, const std::uint8_t* table, const Asking* ask, std::int32_t* out) const {
    if (dim == 64) return value_sums_of<4>(rows, part, parts, before, operand, sum, table, ask, out);
    dim == 128 ? value_sums_of<2>(rows, part, parts, before, operand, sum, table, ask, out)
               : value_sums_of<1>(rows, part, parts, before, operand, sum, table, ask, out);
  }

 private:
  static constexpr int kMaps = 3;  // bytes that a window, or two, can touch

  // Two windows that follow each other; of paired indices, `of[0]` is both.
  struct Window {
    std::ptrdiff_t line;  // of its second byte, from the first line of the run
    std::uint64_t maps[kMaps];
  };
  struct Windows {
    bool simple;  // two bytes each, neither of them before the segment
    Window of[2];
  };

  Windows two_windows(int n) const {
    const int pair = segment_bytes(code), even = 8 - kHistory + n * pair, odd = even + code.widths[0], end = even + pair + kHistory;
    const auto touched = [](int from, int to) { return (to - 1) / 8 - from / 8 + 1; };
    const int most = paired ? touched(even, end) : std::max(touched(even, odd + kHistory), touched(odd, end));
    Windows out = {};
    out.simple = most <= 2 && even / 8 > 0;
    const int last = pair + 1 - (out.simple ? 2 : kMaps);  // byte to begin with, so that none after the segment is read
    for (int phase = 0; phase < 2; ++phase) {
      Window& window = out.of[paired ? 0 : phase];
      const int begin = phase == 0 ? even : odd, first = std::min((paired ? even : begin) / 8, last);
      window.line = 64 * first;
      for (int bit = 0; bit < kHistory + code.widths[phase]; ++bit) {
        const unsigned column = index_column(code, phase, bit) << (paired ? 4 * phase : 0);
        const int at = begin + bit - 8 * first;
        for (int i = 0; i < 8; ++i) window.maps[at / 8] |= std::uint64_t{column >> i & 1} << (8 * (7 - i) + at % 8);
      }
    }
    return out;
  }

  template <bool Simple>
  static KVF_INLINE Reg index(const Window& window, const std::uint8_t* lines, const std::uint8_t* before) {
    const auto map = [&](int i) KVF_INLINE_LAMBDA { return _mm512_set1_epi64(static_cast<long long>(window.maps[i])); };
    const std::uint8_t* next = lines + window.line;
    const Reg a = _mm512_gf2p8affine_epi64_epi8(load(Simple || window.line > 0 ? next - 64 : before), map(0), 0);
    const Reg b = _mm512_gf2p8affine_epi64_epi8(load(next), map(1), 0);
    if constexpr (Simple) return _mm512_xor_si512(a, b);
    constexpr int kExclusiveOr = 0x96;
    return _mm512_ternarylogic_epi64(a, b, _mm512_gf2p8affine_epi64_epi8(load(next + 64), map(2), 0), kExclusiveOr);
  }

  // Of both windows; above them, bytes may have other bits.
  template <bool Simple, bool Paired>
  static KVF_INLINE void indices(const Windows& both, const std::uint8_t* lines, const std::uint8_t* before, Reg* out) {
    out[0] = index<Simple>(both.of[0], lines, before);
    out[1] = Paired ? _mm512_srli_epi16(out[0], 4) : index<Simple>(both.of[1], lines, before);
  }

  template <bool Paired>
  void key_rows(int rows, const std::uint8_t* codes, const std::uint8_t* first, const std::uint8_t* operand, const std::int32_t* sum,
                const std::uint8_t* table, Asking ask, std::int32_t* out) const {
    if (rows == 1) return key_sums_of<1, Paired>(codes, first, operand, sum, table, ask, out);
    rows == 2 ? key_sums_of<2, Paired>(codes, first, operand, sum, table, ask, out)
              : key_sums_of<4, Paired>(codes, first, operand, sum, table, ask, out);
  }

  template <int Rows, bool Paired>
  void key_sums_of(const std::uint8_t* codes, const std::uint8_t* first, const std::uint8_t* operand, const std::int32_t* sum,
                   const std::uint8_t* table, Asking ask, std::int32_t* out) const {
    const int blocks = dim / 64, group = blocks * run_bytes;
    const Reg levels = _mm512_load_si512(table);
    Reg high[2 * Rows], low[2 * Rows];
    unroll<2 * Rows>([&](auto i) KVF_INLINE_LAMBDA {
      high[i] = _mm512_setzero_si512();
      low[i] = _mm512_set1_epi32(-SimdAvx512::kBias * sum[i % Rows]);
    });
    Reg earlier[2];  // words whose highest byte comes before the first segment of a block
    unroll<2>([&](auto g) KVF_INLINE_LAMBDA {
      const Reg wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(first + kLanes * g)));
      earlier[g] = _mm512_slli_epi32(wide, 24);
    });
    alignas(64) std::uint8_t before[2][64];
    const std::ptrdiff_t pace = ask.bytes / (blocks * kSegment);
    for (int block = 0; block < blocks; ++block, codes += run_bytes, operand += 8 * kSegment) {
      unroll<2>([&](auto g) KVF_INLINE_LAMBDA {
        const Reg last = load(codes + g * group + run_bytes - 64);
        _mm512_store_si512(before[g], _mm512_shldi_epi32(last, earlier[g], 8));
        earlier[g] = last;
      });
      for (int n = 0; n < kSegment / 2; ++n) {
        for (int i = 0; i < 2; ++i, ask.codes += pace) SimdAvx512::prefetch_early(ask.codes);
        Reg both[2][2];
        if (windows[n].simple)
          unroll<2>([&](auto g) KVF_INLINE_LAMBDA { indices<true, Paired>(windows[n], codes + g * group, before[g], both[g]); });
        else
          unroll<2>([&](auto g) KVF_INLINE_LAMBDA { indices<false, Paired>(windows[n], codes + g * group, before[g], both[g]); });
        unroll<2>([&](auto w) KVF_INLINE_LAMBDA {
          const Lines<2> level{{SimdAvx512::lookup(both[0][w], levels), SimdAvx512::lookup(both[1][w], levels)}};
          const std::uint8_t* x = operand + 8 * (2 * n + w);
          unroll<Rows>([&](auto r) KVF_INLINE_LAMBDA {
            SimdAvx512::multiply<2, Rows>(high + r, level, x + r * kOperandRow);
            SimdAvx512::multiply<2, Rows>(low + r, level, x + r * kOperandRow + 4);
          });
        });
      }
    }
    unroll<2 * Rows>([&](auto i) KVF_INLINE_LAMBDA {
      _mm512_store_si512(out + (i / Rows * kTileRows + i % Rows) * kLanes, _mm512_add_epi32(_mm512_slli_epi32(high[i], 8), low[i]));
    });
  }

  template <int Quads>
  void value_sums_of(int rows, int part, const Parts& parts, const std::uint8_t* const* before, const std::uint8_t* operand,
                     const std::int32_t* sum, const std::uint8_t* table, const Asking* ask, std::int32_t* out) const {
    if (rows == 1) return value_rows<Quads, 1>(part, parts, before, operand, sum, table, ask, out);
    rows == 2 ? value_rows<Quads, 2>(part, parts, before, operand, sum, table, ask, out)
              : value_rows<Quads, 4>(part, parts, before, operand, sum, table, ask, out);
  }

  template <int Quads, int Rows>
  void value_rows(int part, const Parts& parts, const std::uint8_t* const* before, const std::uint8_t* operand, const std::int32_t* sum,
                  const std::uint8_t* table, const Asking* ask, std::int32_t* out) const {
    constexpr int kSteps = Quads == 4 ? 2 : 1;  // of two windows
    Reg sums[2 * kSteps * Rows];
    for (int step = 0; step < kSteps; ++step) {
      const Windows& both = windows[part * kSteps + step];
      Reg* to = sums + 2 * step * Rows;
      if (both.simple)
        paired ? two_sums<Quads, Rows, true, true>(both, parts, before, operand, table, ask, to)
               : two_sums<Quads, Rows, true, false>(both, parts, before, operand, table, ask, to);
      else
        paired ? two_sums<Quads, Rows, false, true>(both, parts, before, operand, table, ask, to)
               : two_sums<Quads, Rows, false, false>(both, parts, before, operand, table, ask, to);
    }
    for (int r = 0; r < Rows; ++r) {
      const Reg bias = _mm512_set1_epi32(SimdAvx512::kBias * sum[r]);
      const auto put = [&](int group, Reg total) KVF_INLINE_LAMBDA {
        _mm512_store_si512(out + (group * kTileRows + r) * kLanes, _mm512_sub_epi32(total, bias));
      };
      if constexpr (Quads == 1) {
        put(0, sums[r]);
        put(1, sums[Rows + r]);
      } else {
        Reg total = add_words(sums[r], sums[Rows + r]);
        if constexpr (Quads == 4) total = add_words(total, add_words(sums[2 * Rows + r], sums[3 * Rows + r]));
        put(0, total);
      }
    }
  }

  // Sums of neighbouring words.
  static Reg add_words(Reg a, Reg b) { return _mm512_add_epi32(evens(a, b), odds(a, b)); }

  // Of every lane, of both windows: out [2][Rows].
  template <int Quads, int Rows, bool Simple, bool Paired>
  void two_sums(const Windows& both, const Parts& parts, const std::uint8_t* const* before, const std::uint8_t* operand,
                const std::uint8_t* table, const Asking* ask, Reg* out) const {
    const Windows here = both;
    const Reg levels = _mm512_load_si512(table);
    Reg high[2 * Rows], low[2 * Rows];
    unroll<2 * Rows>([&](auto i) KVF_INLINE_LAMBDA { high[i] = low[i] = _mm512_setzero_si512(); });
    for (int p = 0; p < parts.count; ++p) {
      const std::uint8_t *lines = parts.codes[p], *first = before[p];
      const std::uint8_t* asked = ask[p].codes;
      const std::ptrdiff_t pace = ask[p].bytes / (kTokenQuads / Quads);
      for (int quad = 0; quad < kTokenQuads; quad += Quads, lines += run_bytes, first += 64, operand += 8 * Quads) {
        SimdAvx512::prefetch_early(asked);
        asked += pace;
        Reg of[2];
        indices<Simple, Paired>(here, lines, first, of);
        const Reg a = SimdAvx512::lookup(of[0], levels), b = SimdAvx512::lookup(of[1], levels);
        unroll<Rows>([&](auto r) KVF_INLINE_LAMBDA {
          const std::uint8_t* x = operand + r * kOperandRow;
          const Reg up = repeat<Quads>(x), down = repeat<Quads>(x + 4 * Quads);
          SimdAvx512::add_products(high[r], a, up);
          SimdAvx512::add_products(high[Rows + r], b, up);
          SimdAvx512::add_products(low[r], a, down);
          SimdAvx512::add_products(low[Rows + r], b, down);
        });
      }
    }
    unroll<2 * Rows>([&](auto i) KVF_INLINE_LAMBDA { out[i] = _mm512_add_epi32(_mm512_slli_epi32(high[i], 8), low[i]); });
  }

  template <int Words>
  static KVF_INLINE Reg repeat(const std::uint8_t* p) {
    if constexpr (Words == 4) return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    std::int64_t two;
    if constexpr (Words == 2) {
      std::memcpy(&two, p, sizeof two);
      return _mm512_set1_epi64(two);
    }
    std::int32_t word;
    std::memcpy(&word, p, sizeof word);
    return _mm512_set1_epi32(word);
  }

  template <int Words>
  static Reg pick(Reg a, Reg b) {
    return _mm512_castps_si512(_mm512_shuffle_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), Words));
  }

  const bool paired;
  Windows windows[kSegment / 2];
};

}  // namespace
}  // namespace kvfold
#endif
