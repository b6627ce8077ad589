// X^T X on and above the diagonal, as observers of activations sum it: float32 within a sample, float64 across samples.
//
//   x        [num_tokens, n]            float32, rows one behind the other, any alignment
//   product  [n, n]                     float32: gives way to X^T X on and above the diagonal; or nullptr
//   sum      [height, n - first] each   float64, a strip of rows `first` .. `first` + height of the result from their diagonal to
//                                       the right, rows one behind the other: X^T X is added; or nullptr
//
// Below the diagonal there is nothing to be read: some products, or 0. An element is summed in float32 over kTokens tokens, one
// fused multiplication after the other, and these sums are added in float32 in their order. So its bits depend on the sample
// alone, not on the number of threads, on how the result is cut into strips, or on the instruction set.
#pragma once

#include <cstddef>

namespace halfbin {

constexpr size_t kTokens = 256;    // whose products are summed in registers
constexpr size_t kPanel = 48;      // columns of x that lie together once copied; so are their products skipped below the diagonal
constexpr size_t kRows = 384;      // of a block, at most
constexpr size_t kColumns = 1056;  // of a block, at most: 1.6 MB of float32
// Numbers that a block needs room for: its products, and kTokens tokens of its rows' and of one panel's columns.
constexpr size_t kRoom = kRows * kColumns + kTokens * (kRows + kPanel);

struct Sample {
  const float* x;
  size_t num_tokens, n;
};

// Rows first_row .. first_row + height of the result, height <= kRows, and width <= kColumns of its columns from first_column on.
struct Block {
  size_t first_row, height, first_column, width;
  float* product;  // of the first element
  double* sum;
  size_t stride;  // between rows
};

using SyrkKernel = void (*)(const Sample& sample, const Block& block, float* room);

extern const SyrkKernel kSyrkPortable;
#if defined(__x86_64__)
extern const SyrkKernel kSyrkAvx2, kSyrkAvx512;
#endif

// "portable", "avx2" or "avx512"; nullptr where this build has no such loop. The processor is not asked.
SyrkKernel SyrkOf(const char* instruction_set);

struct Strip {
  size_t first, height;
  double* sum;
};

void AddToStrips(SyrkKernel kernel, const Sample& sample, const Strip* strips, size_t num_strips, size_t num_threads);
void UpperProduct(SyrkKernel kernel, const Sample& sample, float* product, size_t num_threads);

}  // namespace halfbin
