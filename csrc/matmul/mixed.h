// LLM.int8(): a product in integers but for a few columns, those of inputs that are outliers, which are multiplied as floats.
#pragma once

#include "matmul/linear.h"

namespace halfbin::matmul {

// Which columns are floats. Those of `ids`, always, with their own values; and of the others each in which any |x| of the batch is
// `threshold` or more: their values are those that the codes stand for, u - z times the scale, rounded once to float32.
struct FloatColumns {
  float threshold;
  const int32_t* ids;  // [count], rising, below k
  Tensor values;       // [count, n], of any type
  size_t count;
};

// y = x_hat @ w_hat^T + x[:, F] @ w[:, F]^T + bias for the columns F that are floats. The inputs of the first product are 0 in F, so
// that F sets no scales there. To its float32 value, a column's product at a time is added, `columns.ids` first, then those found, each
// rounded before and after the sum; then the bias; then y is rounded to its type. The packed weight is read once, and of the columns
// found four neighbours each once more.
//
// Returns how many inputs are NaN or infinite; y is not written then. Bits depend on neither instruction set nor threads.
size_t RunMixed(const Linear& linear, const FloatColumns& columns, const InstructionSet& set, size_t num_threads);

}  // namespace halfbin::matmul
