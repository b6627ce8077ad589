// The inputs of a product, x [m, k], rounded to 8 bits on the fly, and how they lie in memory for it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "matmul/weights.h"

namespace halfbin::matmul {

// What inputs are rounded to. Symmetric: scale = max|x| / qmax. Asymmetric: scale = (max - min) / (qmax - qmin) over a range that
// holds 0, zero point = round(qmin - min / scale). Static ones are told scale and zero point.
struct InputGrid {
  enum class Scales : uint32_t { kTokenAndGroup = 0, kToken = 1, kStatic = 2 } scales;
  bool symmetric;
  int32_t qmin, qmax;  // at most 256 codes, from -128 to 127 or from 0 to 255
  float scale;
  int32_t zero_point;
};

// An input's code q is held as s = q - shift, so that it fits int8, and x_hat = scale * (s - zero) with zero = zero_point - shift.
inline int32_t Shift(const InputGrid& grid) { return grid.qmax > 127 ? 128 : 0; }
inline bool HasZeros(const InputGrid& grid) { return !grid.symmetric || Shift(grid) != 0; }

// Tokens are cut into tiles of `tile` tokens, the last one filled up with zeros; a group of columns into runs of `run` bytes.
//   codes:              [tiles][groups][padded / run][tile][run]
//   group_scales, sums: [tiles][groups][tile]
struct Inputs {
  size_t m, tiles, tile, run, groups, padded;
  int8_t* codes;
  float* group_scales;  // 1 where scales are a token's
  int32_t* sums;        // of s over the group
  float* token_scales;  // [tiles * tile]; 1 where scales are a group's; NaN where the token holds NaN or infinity
  int32_t* zeros;       // [tiles * tile]; only read where has_zeros
  bool has_zeros;

  // Where the scales and the sums of a tile's tokens lie, for one group.
  size_t At(size_t tile_index, size_t group) const { return (tile_index * groups + group) * tile; }
};

// Bytes of memory that Inputs needs, aligned to 64, and the pointers into it.
size_t InputBytes(size_t m, size_t tile, const Weights& weights);
Inputs PlaceInputs(size_t m, size_t tile, size_t run, const Weights& weights, bool has_zeros, uint8_t* memory);

}  // namespace halfbin::matmul
