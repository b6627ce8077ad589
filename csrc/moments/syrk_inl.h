// A block of X^T X, included once by each instruction set, behind its lanes. HALFBIN_TARGET is the namespace of that set,
// HALFBIN_SYRK the name of its loop, HALFBIN_TILE_HIGH and HALFBIN_TILE_WIDE how many rows and how many times sixteen columns of
// the result its registers hold; both divide a panel.
#include <algorithm>

#include "moments/syrk.h"

namespace halfbin::HALFBIN_TARGET {
namespace {

constexpr size_t kHigh = HALFBIN_TILE_HIGH, kWide = HALFBIN_TILE_WIDE, kColumnsHeld = 16 * kWide;
static_assert(kPanel % kHigh == 0 && kPanel % kColumnsHeld == 0 && kRows % kPanel == 0 && kColumns % kPanel == 0);

// Copies tokens of `width` columns of x, 0 behind them, as panels of kStep columns: kStep numbers for each token, token by token.
template <size_t kStep>
void CopyPanels(const float* x, size_t n, size_t num_tokens, size_t width, float* panels) {
  for (size_t column = 0; column < kPanel; column += kStep, panels += kTokens * kStep) {
    const size_t there = std::min(kStep, width > column ? width - column : 0);
    for (size_t t = 0; t < num_tokens; ++t) {
      const float* const from = x + t * n + column;
      float* const to = panels + t * kStep;
      if (there == kStep) {
        std::copy(from, from + kStep, to);
      } else {
        std::fill(std::copy(from, from + there, to), to + kStep, 0.0f);
      }
    }
  }
}

// Adds the products of the kHigh columns at `left` and the 16 * kWide at `right` to a corner of the block.
inline void AddTile(const float* left, const float* right, size_t num_tokens, float* products) {
  Floats sums[kHigh][kWide];
#pragma GCC unroll 8
  for (size_t i = 0; i < kHigh; ++i) {
#pragma GCC unroll 3
    for (size_t j = 0; j < kWide; ++j) sums[i][j] = Set(0.0f);
  }
#pragma GCC unroll 8
  for (size_t i = 0; i < kHigh; ++i) {
#pragma GCC unroll 3
    for (size_t j = 0; j < kWide; ++j) __builtin_prefetch(products + i * kColumns + 16 * j, 1);
  }
  for (size_t t = 0; t < num_tokens; ++t, left += kHigh, right += kColumnsHeld) {
    Floats numbers[kWide];
#pragma GCC unroll 3
    for (size_t j = 0; j < kWide; ++j) numbers[j] = Load(right + 16 * j);
#pragma GCC unroll 8
    for (size_t i = 0; i < kHigh; ++i) {
      const Floats number = Set(left[i]);
#pragma GCC unroll 3
      for (size_t j = 0; j < kWide; ++j) sums[i][j] = MulAdd(number, numbers[j], sums[i][j]);
    }
  }
#pragma GCC unroll 8
  for (size_t i = 0; i < kHigh; ++i) {
    float* const row = products + i * kColumns;
#pragma GCC unroll 3
    for (size_t j = 0; j < kWide; ++j) Store(row + 16 * j, Add(Load(row + 16 * j), sums[i][j]));
  }
}

void SyrkBlock(const Sample& sample, const Block& block, float* room) {
  float* const products = room;
  float* const left = products + kRows * kColumns;
  float* const right = left + kTokens * kRows;
  const size_t n = sample.n;
  std::fill(products, products + (block.height + kPanel - 1) / kPanel * kPanel * kColumns, 0.0f);
  for (size_t token = 0; token < sample.num_tokens; token += kTokens) {
    const size_t num_tokens = std::min(kTokens, sample.num_tokens - token);
    const float* const x = sample.x + token * n;
    for (size_t row = 0; row < block.height; row += kPanel) {
      CopyPanels<kHigh>(x + block.first_row + row, n, num_tokens, block.height - row, left + row * kTokens);
    }
    for (size_t column = 0; column < block.width; column += kPanel) {
      CopyPanels<kColumnsHeld>(x + block.first_column + column, n, num_tokens, block.width - column, right);
      const size_t last_column = block.first_column + column + kPanel;  // rows from here on lie below the diagonal
      for (size_t row = 0; row < block.height && block.first_row + row < last_column; row += kPanel) {
        for (size_t i = 0; i < kPanel; i += kHigh) {
          for (size_t j = 0; j < kPanel; j += kColumnsHeld) {
            AddTile(left + (row + i) * kTokens, right + j * kTokens, num_tokens, products + (row + i) * kColumns + column + j);
          }
        }
      }
    }
  }
  for (size_t row = 0; row < block.height; ++row) {
    const float* const from = products + row * kColumns;
    if (block.sum != nullptr) {
      double* const to = block.sum + row * block.stride;
      for (size_t j = 0; j < block.width; ++j) to[j] += static_cast<double>(from[j]);
    }
    if (block.product != nullptr) std::copy(from, from + block.width, block.product + row * block.stride);
  }
}

}  // namespace
}  // namespace halfbin::HALFBIN_TARGET

namespace halfbin {

const SyrkKernel HALFBIN_SYRK = HALFBIN_TARGET::SyrkBlock;

}  // namespace halfbin
