#include "matmul/inputs.h"

namespace halfbin::matmul {
namespace {

size_t Aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

struct Sizes {
  size_t tokens, codes, group_scales, sums, token_scales;
};

Sizes Measure(size_t m, size_t tile, const Weights& w) {
  const size_t tokens = (m + tile - 1) / tile * tile;
  return {tokens, Aligned(tokens * w.groups * w.padded), Aligned(tokens * w.groups * 4), Aligned(tokens * w.groups * 4),
          Aligned(tokens * 4)};
}

}  // namespace

size_t InputBytes(size_t m, size_t tile, const Weights& weights) {
  const Sizes s = Measure(m, tile, weights);
  return s.codes + s.group_scales + s.sums + 2 * s.token_scales;
}

Inputs PlaceInputs(size_t m, size_t tile, size_t run, const Weights& weights, bool has_zeros, uint8_t* memory) {
  const Sizes s = Measure(m, tile, weights);
  Inputs x{};
  x.m = m, x.tile = tile, x.tiles = s.tokens / tile, x.run = run, x.groups = weights.groups, x.padded = weights.padded;
  x.has_zeros = has_zeros;
  x.codes = reinterpret_cast<int8_t*>(memory);
  x.group_scales = reinterpret_cast<float*>(memory += s.codes);
  x.sums = reinterpret_cast<int32_t*>(memory += s.group_scales);
  x.token_scales = reinterpret_cast<float*>(memory += s.sums);
  x.zeros = reinterpret_cast<int32_t*>(memory += s.token_scales);
  return x;
}

}  // namespace halfbin::matmul
