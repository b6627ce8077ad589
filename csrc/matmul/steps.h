// The steps of a product that are plain loops. Each instruction set's file includes this and compiles it for itself, hence the
// unnamed namespace: no function compiled for one processor may be linked into the code for another.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "matmul/scalars.h"

// Unrolls the loop that follows, of at most 8 turns, early enough for an array of sums that it goes over to become registers: gcc 12
// left them in memory, which took three quarters of the speed (0.23 against 0.8 TOPS at 6 tokens x 64 rows, AVX512-VNNI).
#define HALFBIN_UNROLL _Pragma("GCC unroll 8")

namespace halfbin::matmul {
namespace {

// Not std::min: a function that the linker shares may be the one compiled for another processor.
inline size_t Min(size_t a, size_t b) { return a < b ? a : b; }
inline size_t Max(size_t a, size_t b) { return a > b ? a : b; }
inline size_t Ceil(size_t n, size_t d) { return (n + d - 1) / d; }

// Load, and zeros up to 64 behind the numbers: whole pieces become vector instructions.
inline void LoadPiece(const Tensor& x, size_t at, size_t n, float* out) {
  if (n == 64) {
    Load(x, at, 64, out);
  } else {
    std::memset(out, 0, 64 * sizeof(float));
    Load(x, at, n, out);
  }
}

// Floats as integers of the same order, negative zero just below zero, and back.
inline int32_t Ordered(float x) {
  const int32_t bits = static_cast<int32_t>(BitsOf(x));
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

inline float FromOrdered(int32_t i) { return FromBits(static_cast<uint32_t>(i ^ ((i >> 31) & 0x7fffffff))); }

struct Range {
  float least, greatest;  // 0 lies within
  bool finite;
};

// From the least and the greatest number, ordered, and 0.
inline Range RangeFrom(int32_t least, int32_t greatest) {
  constexpr int32_t kInfinity = 0x7f800000;
  return {FromOrdered(least), FromOrdered(greatest), greatest < kInfinity && least > ~kInfinity};
}

inline Range RangeOf(const Tensor& x, size_t at, size_t n) {
  constexpr size_t kLanes = 16;
  alignas(64) int32_t low[kLanes] = {}, high[kLanes] = {};
  alignas(64) float v[64];
  for (size_t i = 0; i < n; i += 64) {
    LoadPiece(x, at + i, n - i < 64 ? n - i : 64, v);
    for (size_t j = 0; j < 64; j += kLanes) {
      for (size_t l = 0; l < kLanes; ++l) {
        const int32_t o = Ordered(v[j + l]);
        low[l] = o < low[l] ? o : low[l];
        high[l] = o > high[l] ? o : high[l];
      }
    }
  }
  int32_t least = 0, greatest = 0;
  for (size_t l = 0; l < kLanes; ++l) {
    least = low[l] < least ? low[l] : least;
    greatest = high[l] > greatest ? high[l] : greatest;
  }
  return RangeFrom(least, greatest);
}

struct Step {
  float scale;
  int32_t zero_point;
};

// The scale that covers a range, > 0, as numerics/affine.py computes it.
inline Step StepOf(const InputGrid& grid, const Range& range) {
  if (grid.scales == InputGrid::Scales::kStatic) return {grid.scale, grid.zero_point};
  const float qmin = static_cast<float>(grid.qmin), qmax = static_cast<float>(grid.qmax);
  float scale;
  if (grid.symmetric) {
    const float below = grid.qmin == 0 ? 0.0f : -range.least;
    scale = (below > range.greatest ? below : range.greatest) / qmax;
  } else {
    scale = range.greatest / (qmax - qmin) - range.least / (qmax - qmin);
  }
  if (!(scale > 0)) scale = 1.0f;
  if (scale < std::numeric_limits<float>::min()) scale = std::numeric_limits<float>::min();
  if (grid.symmetric) return {scale, 0};
  const float zero = qmin - range.least / scale;
  const float clipped = !(zero > qmin) ? qmin : zero > qmax ? qmax : zero;  // NaN, of a range that is not finite, too
  return {scale, static_cast<int32_t>(BitsOf(clipped + 0x1.8p23f) - BitsOf(0x1.8p23f))};
}

// Codes s of n <= 64 numbers from x[at] on, then zeros up to 64. Returns the sum of s.
inline int32_t RoundPiece(const Tensor& x, size_t at, size_t n, const InputGrid& grid, const Step& step, int8_t* out) {
  alignas(64) float v[64];
  LoadPiece(x, at, n, v);
  // Clipped before they are rounded, which is the same as both ends are integers; then the sum's last bits are the integer.
  const float low = static_cast<float>(grid.qmin - step.zero_point), high = static_cast<float>(grid.qmax - step.zero_point);
  const int32_t offset = step.zero_point - Shift(grid) - static_cast<int32_t>(BitsOf(0x1.8p23f));
  for (size_t i = 0; i < 64; ++i) {
    float q = v[i] / step.scale;
    q = q < low ? low : q;
    q = q > high ? high : q;
    out[i] = static_cast<int8_t>(static_cast<int32_t>(BitsOf(q + 0x1.8p23f)) + offset);
  }
  if (n < 64) std::memset(out + n, 0, 64 - n);
  int32_t sum = 0;
  for (size_t i = 0; i < 64; ++i) sum += out[i];
  return sum;
}

// The loops that RoundTokens takes, unless an instruction set has its own.
struct PlainLoops {
  static constexpr auto RangeOf = &matmul::RangeOf;
  static constexpr auto RoundPiece = &matmul::RoundPiece;
};

// One group of a token: `columns` numbers from x[at] on. Returns the sum of the codes.
template <class Loops>
inline int32_t RoundGroup(const Tensor& x, size_t at, size_t columns, const InputGrid& grid, const Step& step, bool finite,
                          const Inputs& to, int8_t* first_run) {
  alignas(64) int8_t codes[64];
  int32_t sum = 0;
  for (size_t c = 0; c < to.padded; c += 64) {
    const size_t here = !finite || c >= columns ? 0 : columns - c < 64 ? columns - c : 64;
    sum += Loops::RoundPiece(x, at + c, here, grid, step, codes);
    const size_t bytes = to.padded - c < 64 ? to.padded - c : 64;
    if (to.tile == 1) {
      std::memcpy(first_run + c, codes, bytes);
    } else if (to.run == 4) {
      for (size_t i = 0; i < bytes; i += 4) std::memcpy(first_run + (c + i) * to.tile, codes + i, 4);
    } else {
      for (size_t i = 0; i < bytes; i += to.run) std::memcpy(first_run + (c + i) * to.tile, codes + i, to.run);
    }
  }
  return sum;
}

template <class Loops = PlainLoops>
size_t RoundTokens(const Tensor& x, const InputGrid& grid, const Product& product, size_t first, size_t last) {
  const Inputs& to = product.inputs;
  const size_t k = product.weights.header.k, group_size = product.weights.header.group_size;
  const bool by_group = grid.scales == InputGrid::Scales::kTokenAndGroup;
  size_t odd = 0;
  for (size_t t = first; t < last; ++t) {
    const bool real = t < to.m;
    int8_t* codes = to.codes + t / to.tile * (to.groups * to.padded * to.tile) + t % to.tile * to.run;
    Range range{0, 0, true};
    if (real && !by_group) range = Loops::RangeOf(x, t * k, k);
    Step step = StepOf(grid, range);
    bool all_finite = range.finite;
    for (size_t g = 0; g < to.groups; ++g) {
      const size_t begin = g * group_size, columns = k - begin < group_size ? k - begin : group_size;
      if (real && by_group) {
        range = Loops::RangeOf(x, t * k + begin, columns);
        step = StepOf(grid, range);
        all_finite = all_finite && range.finite;
      }
      const size_t at = to.At(t / to.tile, g) + t % to.tile;
      int8_t* run = codes + g * to.padded * to.tile;
      to.sums[at] = RoundGroup<Loops>(x, t * k + begin, real ? columns : 0, grid, step, range.finite, to, run);
      to.group_scales[at] = !by_group ? 1.0f : range.finite ? step.scale : std::numeric_limits<float>::quiet_NaN();
    }
    to.token_scales[t] = by_group ? 1.0f : range.finite ? step.scale : std::numeric_limits<float>::quiet_NaN();
    to.zeros[t] = step.zero_point - Shift(grid);
    odd += all_finite ? 0 : 1;
  }
  return odd;
}

// The scales of a block as float32.
inline void LoadScales(const Weights& w, const uint8_t* block, float* out) {
  const uint8_t* from = block + w.code_bytes;
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(from);
  if (w.header.scale_type == Float::kFloat32) {
    std::memcpy(out, from, kPanelRows * 4);
  } else if (w.header.scale_type == Float::kFloat16) {
    for (size_t r = 0; r < kPanelRows; ++r) out[r] = FromHalf(halves[r]);
  } else {
    for (size_t r = 0; r < kPanelRows; ++r) out[r] = FromBfloat16(halves[r]);
  }
}

// y[t][r] += float(correct(totals[t][r], t, r)) * scales[r] * group_scales[t], for `Rows` of 64 rows.
template <size_t Rows, class Correct>
inline void AddScaled(const uint32_t* __restrict totals, size_t tokens, const float* __restrict scales,
                      const float* __restrict group_scales, Correct correct, float* __restrict y) {
  for (size_t t = 0; t < tokens; ++t, totals += kPanelRows, y += kPanelRows) {
    for (size_t r = 0; r < Rows; ++r) {
      const float part = static_cast<float>(static_cast<int32_t>(correct(totals[r], t, r))) * scales[r];
      y[r] = __builtin_fmaf(part, group_scales[t], y[r]);
    }
  }
}

// From the sums of products of group g of one tile of tokens, int32 [tile][64], to y, float32 [tile][64], for `Rows` rows of a panel
// from `row` on. `centred`: the sums are those of u - z already. A function of its own, or its loops take the caller's registers.
template <size_t Rows>
[[gnu::noinline]] void AddGroup(const Product& p, const uint8_t* block, const float* scales, size_t g, size_t tile, size_t row,
                                bool centred, const uint32_t* totals, float* y) {
  const Weights& w = p.weights;
  const Inputs& x = p.inputs;
  const size_t at = x.At(tile, g);
  const float* group_scales = x.group_scales + at;
  const int32_t* input_sums = x.sums + at;
  const uint32_t zero = static_cast<uint32_t>(w.header.zero);
  const bool has_zeros = w.header.has_zeros && !centred, has_zero = !w.header.has_zeros && !centred && zero != 0;
  const auto add = [&](auto correct) { AddScaled<Rows>(totals + row, x.tile, scales + row, group_scales, correct, y + row); };
  if (x.has_zeros || has_zeros) {
    const uint8_t* zeros = block + w.zeros_at + row;
    const uint32_t* sums = reinterpret_cast<const uint32_t*>(block + w.sums_at) + row;
    add([&](uint32_t total, size_t t, size_t r) {
      const uint32_t sum = centred ? 0 : static_cast<uint32_t>(input_sums[t]);
      const uint32_t x_zero = x.has_zeros ? static_cast<uint32_t>(x.zeros[tile * x.tile + t]) : 0;
      return total - (has_zeros ? zeros[r] : zero) * sum - (x.has_zeros ? x_zero * sums[r] : 0);
    });
  } else if (has_zero) {
    add([&](uint32_t total, size_t t, size_t) { return total - zero * static_cast<uint32_t>(input_sums[t]); });
  } else {
    add([](uint32_t total, size_t, size_t) { return total; });
  }
}

// Rows of a panel of y, float32 [tokens][64], scaled, with bias, to where they belong.
inline void Finish(const Product& p, size_t panel, size_t first_token, size_t tokens, const float* __restrict y) {
  const size_t n = p.weights.header.n, first = panel * kPanelRows, rows = n - first < kPanelRows ? n - first : kPanelRows;
  alignas(64) float bias[kPanelRows] = {}, row[kPanelRows];
  // A copy of a size that is known becomes four stores; otherwise it took 18 % of an int8 product of 512 tokens.
  const auto store = [rows](auto* to, const auto* from) {
    if (rows == kPanelRows) {
      std::memcpy(to, from, kPanelRows * sizeof *from);
    } else {
      std::memcpy(to, from, rows * sizeof *from);
    }
  };
  if (p.bias.data != nullptr) Load(p.bias, first, rows, bias);
  for (size_t i = 0; i < tokens && first_token + i < p.inputs.m; ++i, y += kPanelRows) {
    const float scale = p.inputs.token_scales[first_token + i];
    for (size_t r = 0; r < kPanelRows; ++r) row[r] = y[r] * scale + bias[r];
    const size_t at = (first_token + i) * n + first;
    if (p.y_type == Float::kFloat32) {
      store(static_cast<float*>(p.y) + at, row);
    } else {
      uint16_t narrow[kPanelRows];
      for (size_t r = 0; r < kPanelRows; ++r) narrow[r] = ToBfloat16(row[r]);
      store(static_cast<uint16_t*>(p.y) + at, narrow);
    }
  }
}

// `columns` of a panel, a multiple of 16, to weights.h's layout of 8 bits: from 2 bits.
// Four bytes at once: no instruction set here shifts single ones, and gcc 12 then made words of them.
inline void UnpackCrumbs(const uint8_t* codes, size_t columns, uint8_t* out) {
  using Word [[gnu::may_alias]] = uint32_t;
  const Word* __restrict from = reinterpret_cast<const Word*>(codes);
  Word* __restrict to = reinterpret_cast<Word*>(out);
  for (size_t c = 0; c < columns; c += 16, from += 64, to += 256) {
    for (size_t i = 0; i < 64; ++i) {
      const uint32_t four = from[i];
      to[i] = four & 0x03030303u, to[64 + i] = four >> 2 & 0x03030303u;
      to[128 + i] = four >> 4 & 0x03030303u, to[192 + i] = four >> 6 & 0x03030303u;
    }
  }
}

// The same from 4 bits, a multiple of 8 columns, through the table of 16 bytes.
inline void LookUpNibbles(const uint8_t* __restrict codes, size_t columns, const uint8_t* table, uint8_t* __restrict out) {
#ifdef __AVX2__
  const __m256i values = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  const __m256i low = _mm256_set1_epi8(0xf);
  for (size_t c = 0; c < columns; c += 8, codes += 256, out += 512) {
    for (size_t i = 0; i < 256; i += 32) {
      const __m256i both = _mm256_load_si256(reinterpret_cast<const __m256i*>(codes + i));
      const __m256i next = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
      _mm256_store_si256(reinterpret_cast<__m256i*>(out + i), _mm256_shuffle_epi8(values, _mm256_and_si256(both, low)));
      _mm256_store_si256(reinterpret_cast<__m256i*>(out + 256 + i), _mm256_shuffle_epi8(values, next));
    }
  }
#else
  for (size_t c = 0; c < columns; c += 8, codes += 256, out += 512) {
    for (size_t i = 0; i < 256; ++i) out[i] = table[codes[i] & 0xf], out[256 + i] = table[codes[i] >> 4];
  }
#endif
}

// What a group's totals are scaled by, and what zero points take off them: zeros[row] * input_sums[token], or zero * input_sums[token]
// where zeros are null.
struct GroupScales {
  const float *scales, *group_scales;
  const int32_t* input_sums;
  const uint8_t* zeros;
  uint32_t zero;
};

// The order of a product: spans of tokens whose inputs stay in the second cache, panels, blocks of tokens, groups, chunks of columns,
// tiles of tokens, parts of a panel's rows. What a block needs of one group stays in the first cache. `Dot` has
//
//   kTilesAtOnce, kPartRows           tiles of tokens and rows of a panel that one call takes
//   kNeverUnpacks, kAlwaysUnpacks     whether codes of 4 bits become bytes first; neither: when several calls share them
//   kCentres                          whether they are u - z, signed, then
//   Dot(const Inputs&)
//   Bytes(codes, columns, x, tiles, add, totals)     codes of 8 bits; `x` of the first tile at these columns, tiles next to
//   Nibbles(codes, columns, x, tiles, add, totals)   each other x_tile_bytes apart; totals uint32 [tiles * tile][64], set or added to
//   Centred(...)                                     as Bytes, for what Unpack made, where kCentres
//   Unpack(codes, columns, block, weights, out)      from 4 bits to 8
//   Crumbs(...), LookedUp(..., table)                as Nibbles, codes of 2 bits and those with a table; where there is no such function
//                                                    they always become bytes first, by the loops above
//   Scaled(bits, centred, codes, columns, x, tiles, table, group, y, memory)
//                                                    where there is such a function: products of a whole group and their scaling into y,
//                                                    or false, and nothing is done; numbers of `group` for the next tile are
//                                                    `groups * tile` further
//
// Totals are scaled one call late, so that the processor has products to work on meanwhile.
template <class Dot>
class Multiplier {
 public:
  Multiplier(const Product& product, uint8_t* memory)
      : p_(product),
        dot_(product.inputs),
        y_(reinterpret_cast<float*>(memory)),
        totals_(reinterpret_cast<uint32_t*>(memory + kTokenBlock * kPanelRows * 4)),
        unpacked_(memory + 2 * kTokenBlock * kPanelRows * 4) {}

  void Run(size_t first, size_t last) {
    const Inputs& x = p_.inputs;
    const size_t calls = Ceil(x.tiles, Dot::kTilesAtOnce), call_tokens = x.tile * Dot::kTilesAtOnce;
    const size_t block_calls = kTokenBlock / call_tokens, token_bytes = x.groups * x.padded;
    const size_t span_blocks = Max(1, p_.cached_bytes / (block_calls * call_tokens * token_bytes));
    const size_t spans = Ceil(calls, span_blocks * block_calls);
    for (size_t i = 0; i < spans; ++i) Span(calls * i / spans, calls * (i + 1) / spans, block_calls, first, last);
  }

 private:
  // Calls from `begin` to `end`, for all panels. Blocks are of about the same size: a last one of a tile would go through all codes for
  // little.
  void Span(size_t begin, size_t end, size_t block_calls, size_t first, size_t last) {
    const size_t calls = end - begin, blocks = Ceil(calls, block_calls);
    const Weights& w = p_.weights;
    // While calls share a panel, what comes next is asked for from memory, a slice at each call: the next panel, evenly over all calls,
    // where it has room beside this one, or else what lies kAhead before the first block's calls. Alone, a call asks for itself.
    const size_t chunks = w.groups * Ceil(w.padded, kColumnChunk), parts = kPanelRows / Dot::kPartRows;
    const bool next_panel = w.panel_bytes <= p_.cached_bytes / 4;
    const auto slice = [&](size_t some) { return Ceil(w.panel_bytes, some * parts * chunks * 64) * 64; };
    for (size_t panel = first; panel < last; ++panel) {
      ahead_ = w.panels + panel * w.panel_bytes + (next_panel ? w.panel_bytes : kAhead);
      for (size_t i = 0; i < blocks; ++i) {
        const size_t here = calls * (i + 1) / blocks - calls * i / blocks;
        slice_ = calls == 1 ? 0 : next_panel ? slice(calls) : i == 0 ? slice(here) : 0;
        first_tile_ = (begin + calls * i / blocks) * Dot::kTilesAtOnce;
        end_tile_ = Min((begin + calls * (i + 1) / blocks) * Dot::kTilesAtOnce, p_.inputs.tiles);
        several_ = end_tile_ - first_tile_ > Dot::kTilesAtOnce;
        const size_t tokens = (end_tile_ - first_tile_) * p_.inputs.tile;
        std::memset(y_, 0, tokens * kPanelRows * sizeof *y_);
        for (size_t g = 0; g < w.groups; ++g) Group(panel, g);
        Finish(p_, panel, first_tile_ * p_.inputs.tile, tokens, y_);
      }
    }
  }

  void Group(size_t panel, size_t g) {
    const Weights& w = p_.weights;
    const uint8_t* block = w.panels + panel * w.panel_bytes + g * w.block_bytes;
    alignas(64) float scales[kPanelRows];
    LoadScales(w, block, scales);
    const bool plain = w.header.bits == 8 || (w.header.bits == 4 && !w.has_table);
    const bool as_they_are = w.header.bits == 2 ? kHasCrumbs : kHasTables;
    const bool unpack = plain ? w.header.bits == 4 && (several_ || Dot::kAlwaysUnpacks) && !Dot::kNeverUnpacks
                              : several_ || !as_they_are;
    // Unpacked codes lie in memory of one chunk; other codes are cut so that they stay in the cache for all tiles.
    const size_t most = unpack || several_ ? kColumnChunk : w.padded;
    for (size_t c = 0; c < w.padded; c += most) {
      const size_t columns = w.padded - c < most ? w.padded - c : most;
      const uint8_t* codes = block + c * kPanelRows * w.header.bits / 8;
      if (unpack && plain) {
        dot_.Unpack(codes, columns, block, w, unpacked_);
      } else if (unpack && w.has_table) {
        LookUpNibbles(codes, columns, w.header.table, unpacked_);
      } else if (unpack) {
        UnpackCrumbs(codes, columns, unpacked_);
      }
      Chunk(block, scales, g, c, columns, unpack ? unpacked_ : codes, unpack, unpack && plain && Dot::kCentres);
    }
  }

  // All tiles of the block times one chunk; behind a group's last chunk, totals go into y.
  void Chunk(const uint8_t* block, const float* scales, size_t g, size_t c, size_t columns, const uint8_t* codes, bool unpacked,
             bool centred) {
    const Weights& w = p_.weights;
    const Inputs& x = p_.inputs;
    const bool last = c + columns == w.padded, whole = columns == w.padded;
    const uint32_t bits = unpacked ? 8 : w.header.bits;
    const size_t tile_bytes = w.groups * w.padded * x.tile, tile_totals = x.tile * kPanelRows;
    // Totals of a group that is one chunk are scaled at the next call: two calls' memory serves for all.
    const auto totals_of = [&](size_t tile) {
      const size_t i = tile - first_tile_;
      return totals_ + (whole ? i / Dot::kTilesAtOnce % 2 * Dot::kTilesAtOnce : i) * tile_totals;
    };
    const auto add_group = [&](size_t tile, size_t tiles, size_t row) {
      for (size_t i = 0; i < tiles; ++i) {
        AddGroup<Dot::kPartRows>(p_, block, scales, g, tile + i, row, centred, totals_of(tile) + i * tile_totals,
                                 y_ + (tile + i - first_tile_) * tile_totals);
      }
    };
    size_t late_tile = 0, late_tiles = 0, late_row = 0;
    for (size_t tile = first_tile_; tile < end_tile_; tile += Dot::kTilesAtOnce) {
      const size_t tiles = Min(end_tile_ - tile, Dot::kTilesAtOnce);
      const int8_t* s = x.codes + tile * tile_bytes + (g * w.padded + c) * x.tile;
      for (size_t row = 0; row < kPanelRows; row += Dot::kPartRows) {
        for (const uint8_t* end = ahead_ + slice_; ahead_ < end; ahead_ += 64) __builtin_prefetch(ahead_, 0, 2);
        if constexpr (kScales) {
          if (whole && !x.has_zeros &&
              dot_.Scaled(bits, centred, codes + row * 4, columns, s, tiles, bits == 4 && w.has_table ? w.header.table : nullptr,
                          GroupOf(block, scales, g, tile, row, centred), y_ + (tile - first_tile_) * tile_totals + row, totals_)) {
            continue;
          }
        }
        Call(bits, centred, codes + row * 4, columns, s, tiles, c != 0, totals_of(tile) + row);
        if (last && late_tiles != 0) add_group(late_tile, late_tiles, late_row);
        late_tile = tile, late_tiles = tiles, late_row = row;
      }
    }
    if (last && late_tiles != 0) add_group(late_tile, late_tiles, late_row);
  }

  GroupScales GroupOf(const uint8_t* block, const float* scales, size_t g, size_t tile, size_t row, bool centred) const {
    const Weights& w = p_.weights;
    const size_t at = p_.inputs.At(tile, g);
    return {scales + row, p_.inputs.group_scales + at, p_.inputs.sums + at,
            w.header.has_zeros && !centred ? block + w.zeros_at + row : nullptr,
            centred ? 0 : static_cast<uint32_t>(w.header.zero)};
  }

  void Call(uint32_t bits, bool centred, const uint8_t* codes, size_t columns, const int8_t* x, size_t tiles, bool add,
            uint32_t* totals) {
    if constexpr (kHasCrumbs) {
      if (bits == 2) return dot_.Crumbs(codes, columns, x, tiles, add, totals);
    }
    if constexpr (kHasTables) {
      if (bits == 4 && p_.weights.has_table) {
        return dot_.LookedUp(codes, columns, x, tiles, add, totals, p_.weights.header.table);
      }
    }
    if (bits == 4) return dot_.Nibbles(codes, columns, x, tiles, add, totals);
    if (centred) return dot_.Centred(codes, columns, x, tiles, add, totals);
    dot_.Bytes(codes, columns, x, tiles, add, totals);
  }

  static constexpr size_t kAhead = 32768;  // bytes
  static constexpr bool kHasCrumbs = requires { &Dot::Crumbs; }, kHasTables = requires { &Dot::LookedUp; };
  static constexpr bool kScales = requires { &Dot::Scaled; };

  const Product& p_;
  Dot dot_;
  float* y_;
  uint32_t* totals_;
  uint8_t* unpacked_;
  size_t first_tile_ = 0, end_tile_ = 0;
  bool several_ = false;  // calls of Dot for the tiles of the block
  const uint8_t* ahead_ = nullptr;
  size_t slice_ = 0;
};

template <class Dot>
void Multiply(const Product& p, size_t first, size_t last, uint8_t* memory) {
  Multiplier<Dot>(p, memory).Run(first, last);
}

}  // namespace
}  // namespace halfbin::matmul
