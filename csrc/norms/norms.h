// RMS norm, token by token, in one pass: in torch it is seven passes over memory and as many calls.
//
// Numbers are float32 or bfloat16; all arithmetic is float32, and a result is rounded to bfloat16 where the plain formula in torch
// rounds it. Sums are of float64. Every instruction set and number of threads gives the same bits.
#pragma once

#include <cstddef>

namespace halfbin {

// Rows of x [m, n] (Zhang and Sennrich 2019, arXiv 1910.07467, equation 4):
//
//   r = 1 / sqrt(mean(x^2) + eps)
//   y = weight * round(x * r)           as in Llama; or, where `one_plus`,
//   y = round((1 + weight) * (x * r))   as in Gemma
//
// weight [n] is of the type of x and y.
struct RmsNorm {
  const void *x, *weight;
  void* y;
  size_t m, n;
  float eps;
  bool one_plus, bfloat16;
};

// Rows from `first` to `last`.
using RmsNormKernel = void (*)(const RmsNorm& norm, size_t first, size_t last);

extern const RmsNormKernel kRmsNormPortable;
#if defined(__x86_64__)
extern const RmsNormKernel kRmsNormAvx2, kRmsNormAvx512;
#endif

// "portable", "avx2" or "avx512"; nullptr where this build has no such loop. The processor is not asked.
RmsNormKernel RmsNormOf(const char* instruction_set);

void RunRmsNorm(RmsNormKernel kernel, const RmsNorm& norm, size_t num_threads);

}  // namespace halfbin
