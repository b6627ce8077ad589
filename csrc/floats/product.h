// y = x @ w_hat^T + bias with x as it is: what each instruction set provides, and the sum that all of them compute, to the bit.
//
// For token t and row r, all in float32, with v = value(code) / unit, an exact float32 (weights.h):
//
//   total = fma(x[t, c], v[r, c], total)                over the columns c of group g in their order, from 0
//   y     = fma(unit * total, scale[r, g], y)           groups in their order, from 0
//   y     = y + bias[r]                                 and then rounded once to the type of y
//
// so results depend on neither the instruction set, nor on how tokens, rows and columns are cut, nor on the number of threads. Lanes
// are rows: 64 rows are 64 sums that know nothing of each other. On AVX-512 these are 4 registers, and each addition waits 4 cycles for
// the one before it; a column of 64 rows takes 6, with three instructions for each register on two ports. So a row needs no second sum.
//
// It departs from float(w_hat) = round(scale * value), which the reference multiplies, by that one rounding for each weight, which it
// leaves out, and by the order of the sum. Numbers that are not finite spread as IEEE 754 says. Where |x| * value * k comes to more
// than 3.4e38 a sum is infinite though a scale would have brought it back, and products below 2^-118 lose digits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "floats/weights.h"

namespace halfbin::floats {

// Inputs lie in tiles of `tile` tokens, the last one filled up with zeros: float32 [tiles][groups * padded][tile].
struct Product {
  Weights weights;
  const float* x;
  size_t m, tile, tiles;
  Tensor bias;  // [n]
  void* y;      // [m, n]
  Float y_type;
};

constexpr size_t kMostTokens = 6, kLeastTokens = 4;  // of a tile; fewer only where there are no more
constexpr size_t kTokenBlock = 256;   // tokens that are taken through a panel together, at most
constexpr size_t kColumnChunk = 128;  // columns that are converted to float32 for them: 32 KiB
// float32 y and totals [kTokenBlock][64], and a chunk of v [kColumnChunk][64].
constexpr size_t kProductMemory = (2 * kTokenBlock + kColumnChunk) * kPanelRows * sizeof(float);

// One instruction set. Both functions may be called from several threads at once, for different panels.
struct InstructionSet {
  const char* name;

  // Rows of panels first <= p < last of y, all tokens. `memory`: kProductMemory bytes, aligned to 64, this thread's own.
  void (*multiply)(const Product& product, size_t first, size_t last, uint8_t* memory);

  // round(scale * value), the reference's w_hat to the bit, of one panel, transposed: row c of `out`, `stride` numbers behind the one
  // before, holds column c of 64 rows. `type`: kFloat32 or kBfloat16, rounded twice then, as the reference does. Rows from n on are 0.
  void (*dequantize)(const Weights& weights, size_t panel, Float type, void* out, size_t stride, uint8_t* memory);
};

extern const InstructionSet kPortable;
#if defined(__x86_64__)
extern const InstructionSet kAvx2, kAvx512;
#endif

}  // namespace halfbin::floats
