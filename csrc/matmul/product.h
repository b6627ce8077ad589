// y = x_hat @ w_hat^T + bias: what each instruction set provides, and the sum that all of them compute, to the bit.
//
// With s and u the stored codes of token t and row r (inputs.h, weights.h), over the columns of group g,
//
//   total = sum s u - z[r, g] sum s - zero[t] sums[r, g]                  exact: int32, wrapping on the way
//   y     = (float(total) * scale[r, g]) * group_scale[t, g] + y          float32, groups in their order; the last two operations as
//                                                                         one, rounded once (fma)
//   y     = y * token_scale[t] + bias[r]                                  and then rounded once to the type of y
//
// so results depend on neither the instruction set, nor on how tokens and rows are cut, nor on the number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "matmul/inputs.h"
#include "matmul/weights.h"

namespace halfbin::matmul {

struct Tensor {
  const void* data;  // rows lie one behind the other; null: there is none
  Float type;
};

struct Product {
  Weights weights;
  Inputs inputs;
  Tensor bias;  // [n]
  void* y;      // [m, n]
  Float y_type;
  size_t cached_bytes;  // of inputs' codes that may be kept in the second cache while panels go by
};

// One instruction set. Both functions may be called from several threads at once, for different tokens and panels.
struct InstructionSet {
  const char* name;
  size_t most_tokens;  // of a tile
  size_t run;          // of the inputs' layout; 64 stands for the largest of 64 and 32 that divides the padded group

  // Round tokens first <= t < last of x [m, k] into product.inputs. Padding tokens, t >= m, become zeros. Returns how many tokens
  // hold NaN or infinity; theirs become NaN scales, so that all their outputs are NaN.
  size_t (*round)(const Tensor& x, const InputGrid& grid, const Product& product, size_t first, size_t last);

  // Rows of panels first <= p < last of y, all tokens. `memory`: kProductMemory bytes, aligned to 64, this thread's own.
  void (*multiply)(const Product& product, size_t first, size_t last, uint8_t* memory);
};

// Tokens that are taken through a panel together, and columns whose codes are unpacked together: float y and int32 totals
// [kTokenBlock][64] and the chunk, 48 KiB in all at most, are what the loops go over again and again.
constexpr size_t kTokenBlock = 64;  // a multiple of two tiles
constexpr size_t kColumnChunk = 256;
constexpr size_t kProductMemory = 2 * kTokenBlock * kPanelRows * 4 + kColumnChunk * kPanelRows;

// Null where this build has no such code; whether the processor runs it is another question.
const InstructionSet* Portable();
const InstructionSet* Avx2();
const InstructionSet* AvxVnni();
const InstructionSet* Avx512Vnni();
const InstructionSet* AmxInt8();
const InstructionSet* NeonDotprod();
const InstructionSet* NeonI8mm();

}  // namespace halfbin::matmul
