// A linear layer from end to end: choose the instruction set, bring the inputs into tiles, multiply, on several threads.
#pragma once

#include "floats/product.h"

namespace halfbin::floats {

// "portable", "avx2" or "avx512"; null where this build has no such loops. The processor is not asked.
const InstructionSet* Find(const char* name);

struct Linear {
  Weights weights;
  Tensor x;  // [m, k], float32 or bfloat16
  size_t m;
  Tensor bias;  // [n], float32 or bfloat16
  void* y;      // [m, n], of the type of x
};

// The bits of y depend on neither the instruction set nor the number of threads.
void Run(const Linear& linear, const InstructionSet& set, size_t num_threads);

// w_hat^T of panels first <= p < last, [k, (last - first) * 64] in kFloat32 or kBfloat16, as InstructionSet::dequantize has it.
void Dequantize(const Weights& weights, size_t first, size_t last, Float type, void* out, const InstructionSet& set, size_t num_threads);

}  // namespace halfbin::floats
