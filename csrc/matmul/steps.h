// The steps of a product that are plain loops. Each instruction set's file includes this and compiles it for itself, hence the
// unnamed namespace: no function compiled for one processor may be linked into the code for another.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "matmul/product.h"

namespace halfbin::matmul {
namespace {

inline uint32_t BitsOf(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float FromBits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// float16 to float32, exact for finite numbers: the exponent is moved by a product, which makes normal numbers of subnormal ones.
inline float FromHalf(uint16_t half) {
  const float magnitude = FromBits((half & 0x7fffu) << 13) * 0x1p112f;
  return FromBits(BitsOf(magnitude) | (half & 0x8000u) << 16);
}

inline float FromBfloat16(uint16_t bits) { return FromBits(static_cast<uint32_t>(bits) << 16); }

// To nearest, half to even; NaN stays NaN.
inline uint16_t ToBfloat16(float x) {
  const uint32_t bits = BitsOf(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// n <= 64 numbers from x[at] on, float32 or bfloat16.
inline void Load(const Tensor& x, size_t at, size_t n, float* out) {
  if (x.type == Float::kFloat32) {
    std::memcpy(out, static_cast<const float*>(x.data) + at, n * 4);
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(x.data) + at;
    for (size_t i = 0; i < n; ++i) out[i] = FromBfloat16(from[i]);
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

inline Range RangeOf(const Tensor& x, size_t at, size_t n) {
  int32_t least = 0, greatest = 0;
  alignas(64) float v[64];
  for (size_t i = 0; i < n; i += 64) {
    const size_t here = n - i < 64 ? n - i : 64;
    Load(x, at + i, here, v);
    for (size_t j = 0; j < here; ++j) {
      const int32_t o = Ordered(v[j]);
      least = o < least ? o : least;
      greatest = o > greatest ? o : greatest;
    }
  }
  constexpr int32_t kInfinity = 0x7f800000;
  return {FromOrdered(least), FromOrdered(greatest), greatest < kInfinity && least > ~kInfinity};
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
  const float clipped = zero < qmin ? qmin : zero > qmax ? qmax : zero;
  return {scale, static_cast<int32_t>(BitsOf(clipped + 0x1.8p23f) - BitsOf(0x1.8p23f))};
}

// n <= 64 codes s of numbers v, the rest of 64 zeros. Returns the sum of s.
inline int32_t RoundPiece(const float* v, size_t n, const InputGrid& grid, const Step& step, int8_t* out) {
  // Clipped before they are rounded, which is the same as both ends are integers; then the sum's last bits are the integer.
  const float low = static_cast<float>(grid.qmin - step.zero_point), high = static_cast<float>(grid.qmax - step.zero_point);
  const int32_t offset = step.zero_point - Shift(grid) - static_cast<int32_t>(BitsOf(0x1.8p23f));
  int32_t sum = 0;
  std::memset(out, 0, 64);
  for (size_t i = 0; i < n; ++i) {
    float q = v[i] / step.scale;
    q = q < low ? low : q;
    q = q > high ? high : q;
    const int32_t s = static_cast<int32_t>(BitsOf(q + 0x1.8p23f)) + offset;
    out[i] = static_cast<int8_t>(s);
    sum += s;
  }
  return sum;
}

// One group of a token: `columns` numbers from x[at] on. Returns the sum of the codes.
inline int32_t RoundGroup(const Tensor& x, size_t at, size_t columns, const InputGrid& grid, const Step& step, bool finite,
                          const Inputs& to, int8_t* first_run) {
  alignas(64) float v[64];
  alignas(64) int8_t codes[64];
  int32_t sum = 0;
  for (size_t c = 0; c < to.padded; c += 64) {
    const size_t here = !finite || c >= columns ? 0 : columns - c < 64 ? columns - c : 64;
    Load(x, at + c, here, v);
    sum += here == 64 ? RoundPiece(v, 64, grid, step, codes) : RoundPiece(v, here, grid, step, codes);
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

size_t RoundTokens(const Tensor& x, const InputGrid& grid, const Product& product, size_t first, size_t last) {
  const Inputs& to = product.inputs;
  const size_t k = product.weights.header.k, group_size = product.weights.header.group_size;
  const bool by_group = grid.scales == InputGrid::Scales::kTokenAndGroup;
  size_t odd = 0;
  for (size_t t = first; t < last; ++t) {
    const bool real = t < to.m;
    int8_t* codes = to.codes + t / to.tile * (to.groups * to.padded * to.tile) + t % to.tile * to.run;
    Range range{0, 0, true};
    if (real && !by_group) range = RangeOf(x, t * k, k);
    Step step = StepOf(grid, range);
    bool all_finite = range.finite;
    for (size_t g = 0; g < to.groups; ++g) {
      const size_t begin = g * group_size, columns = k - begin < group_size ? k - begin : group_size;
      if (real && by_group) {
        range = RangeOf(x, t * k + begin, columns);
        step = StepOf(grid, range);
        all_finite = all_finite && range.finite;
      }
      const size_t at = t * to.groups + g;
      int8_t* run = codes + g * to.padded * to.tile;
      to.sums[at] = RoundGroup(x, t * k + begin, real ? columns : 0, grid, step, range.finite, to, run);
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

// From the sums of products of group g, int32 [tokens][64], to y, float32 [tokens][64].
inline void AddGroup(const Product& p, const uint8_t* block, const float* __restrict scales, size_t g, size_t first_token,
                     size_t tokens, const uint32_t* __restrict totals, float* __restrict y) {
  const Weights& w = p.weights;
  const uint8_t* zeros = block + w.zeros_at;
  const uint32_t* sums = reinterpret_cast<const uint32_t*>(block + w.sums_at);
  for (size_t i = 0; i < tokens; ++i, totals += kPanelRows, y += kPanelRows) {
    const size_t t = first_token + i;
    const uint32_t sum = static_cast<uint32_t>(p.inputs.sums[t * w.groups + g]);
    const float group_scale = p.inputs.group_scales[t * w.groups + g];
    const uint32_t constant = w.header.has_zeros ? 0 : sum * static_cast<uint32_t>(w.header.zero);
    const uint32_t x_zero = p.inputs.has_zeros ? static_cast<uint32_t>(p.inputs.zeros[t]) : 0;
    const auto add = [&](auto correction) {
      for (size_t r = 0; r < kPanelRows; ++r) {
        const int32_t total = static_cast<int32_t>(totals[r] - correction(r));
        const float part = static_cast<float>(total) * scales[r] * group_scale;
        y[r] = (g == 0 ? 0.0f : y[r]) + part;
      }
    };
    if (p.inputs.has_zeros) {
      add([&](size_t r) { return (w.header.has_zeros ? zeros[r] * sum : constant) + x_zero * sums[r]; });
    } else if (w.header.has_zeros) {
      add([&](size_t r) { return zeros[r] * sum; });
    } else {
      add([&](size_t) { return constant; });
    }
  }
}

// Rows of a panel of y, float32 [tokens][64], scaled, with bias, to where they belong.
inline void Finish(const Product& p, size_t panel, size_t first_token, size_t tokens, const float* __restrict y) {
  const size_t n = p.weights.header.n, first = panel * kPanelRows, rows = n - first < kPanelRows ? n - first : kPanelRows;
  alignas(64) float bias[kPanelRows] = {}, row[kPanelRows];
  if (p.bias.data != nullptr) Load(p.bias, first, rows, bias);
  for (size_t i = 0; i < tokens && first_token + i < p.inputs.m; ++i, y += kPanelRows) {
    const float scale = p.inputs.token_scales[first_token + i];
    for (size_t r = 0; r < kPanelRows; ++r) row[r] = y[r] * scale + bias[r];
    const size_t at = (first_token + i) * n + first;
    if (p.y_type == Float::kFloat32) {
      std::memcpy(static_cast<float*>(p.y) + at, row, rows * 4);
    } else {
      uint16_t narrow[kPanelRows];
      for (size_t r = 0; r < kPanelRows; ++r) narrow[r] = ToBfloat16(row[r]);
      std::memcpy(static_cast<uint16_t*>(p.y) + at, narrow, rows * 2);
    }
  }
}

// The order of a product: blocks of tokens, panels, groups, chunks of columns, tiles of tokens. `Dot` has
//
//   kTilesAtOnce                      tiles of tokens that one call takes
//   kNeverUnpacks, kAlwaysUnpacks     whether codes of 4 bits become bytes first; neither: when several calls share them
//   Dot(const Inputs&)
//   Bytes(codes, columns, x, tiles, add, totals)     codes of 8 bits; `x` of the first tile at these columns, tiles next to
//   Nibbles(codes, columns, x, tiles, add, totals)   each other x_tile_bytes apart; totals uint32 [tiles * tile][64], set or added to
//   Unpack(codes, columns, out)                      from 4 bits to 8
template <class Dot>
void Multiply(const Product& p, size_t first, size_t last, uint8_t* memory) {
  const Weights& w = p.weights;
  const Inputs& x = p.inputs;
  const size_t tiles_in_block = kTokenBlock / x.tile / Dot::kTilesAtOnce * Dot::kTilesAtOnce;
  const size_t tile_bytes = w.groups * w.padded * x.tile;
  float* y = reinterpret_cast<float*>(memory);
  uint32_t* totals = reinterpret_cast<uint32_t*>(memory + kTokenBlock * kPanelRows * 4);
  uint8_t* unpacked = memory + 2 * kTokenBlock * kPanelRows * 4;
  Dot dot(x);
  for (size_t block_tile = 0; block_tile < x.tiles; block_tile += tiles_in_block) {
    const size_t end_tile = block_tile + tiles_in_block < x.tiles ? block_tile + tiles_in_block : x.tiles;
    const bool several = end_tile - block_tile > Dot::kTilesAtOnce;
    const bool nibbles = w.header.bits == 4, unpack = nibbles && (several || Dot::kAlwaysUnpacks) && !Dot::kNeverUnpacks;
    // Unpacked codes lie in memory of one chunk; other codes are cut so that they stay in the cache for all tiles.
    const size_t most = unpack || several ? kColumnChunk : w.padded;
    for (size_t panel = first; panel < last; ++panel) {
      for (size_t g = 0; g < w.groups; ++g) {
        const uint8_t* block = w.panels + panel * w.panel_bytes + g * w.block_bytes;
        alignas(64) float scales[kPanelRows];
        LoadScales(w, block, scales);
        for (size_t c = 0; c < w.padded; c += most) {
          const size_t columns = w.padded - c < most ? w.padded - c : most;
          const uint8_t* codes = block + c * kPanelRows * w.header.bits / 8;
          if (unpack) dot.Unpack(codes, columns, unpacked);
          for (size_t tile = block_tile; tile < end_tile; tile += Dot::kTilesAtOnce) {
            const size_t tiles = end_tile - tile < Dot::kTilesAtOnce ? end_tile - tile : Dot::kTilesAtOnce;
            const size_t token = (tile - block_tile) * x.tile;
            const int8_t* s = x.codes + tile * tile_bytes + (g * w.padded + c) * x.tile;
            uint32_t* here = totals + token * kPanelRows;
            if (nibbles && !unpack) {
              dot.Nibbles(codes, columns, s, tiles, c != 0, here);
            } else {
              dot.Bytes(unpack ? unpacked : codes, columns, s, tiles, c != 0, here);
            }
            if (c + columns == w.padded) {
              AddGroup(p, block, scales, g, tile * x.tile, tiles * x.tile, here, y + token * kPanelRows);
            }
          }
        }
      }
      Finish(p, panel, block_tile * x.tile, (end_tile - block_tile) * x.tile, y);
    }
  }
}

}  // namespace
}  // namespace halfbin::matmul
