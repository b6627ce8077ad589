#include "moments/syrk.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/threads.h"

namespace halfbin {
namespace {

// The blocks of some rows, from their diagonal to the right.
void CutRows(size_t first, size_t height, size_t n, float* product, double* sum, size_t stride, std::vector<Block>& blocks) {
  for (size_t row = 0; row < height; row += kRows) {
    for (size_t column = first + row; column < n; column += kColumns) {
      const size_t place = row * stride + column - first;
      blocks.push_back({first + row, std::min(kRows, height - row), column, std::min(kColumns, n - column),
                        product ? product + place : nullptr, sum ? sum + place : nullptr, stride});
    }
  }
}

void RunBlocks(SyrkKernel kernel, const Sample& sample, std::vector<Block>& blocks, size_t num_threads) {
  // The largest first, so that threads end together.
  std::stable_sort(blocks.begin(), blocks.end(),
                   [](const Block& a, const Block& b) { return a.height * a.width > b.height * b.width; });
  ParallelFor(num_threads, blocks.size(), [&](size_t task) {
    struct alignas(64) Room {
      float numbers[kRoom];
    };
    const std::unique_ptr<Room> room(new Room);
    kernel(sample, blocks[task], room->numbers);
  });
}

}  // namespace

SyrkKernel SyrkOf(const char* instruction_set) {
  if (std::strcmp(instruction_set, "portable") == 0) return kSyrkPortable;
#if defined(__x86_64__)
  if (std::strcmp(instruction_set, "avx2") == 0) return kSyrkAvx2;
  if (std::strcmp(instruction_set, "avx512") == 0) return kSyrkAvx512;
#endif
  return nullptr;
}

void AddToStrips(SyrkKernel kernel, const Sample& sample, const Strip* strips, size_t num_strips, size_t num_threads) {
  std::vector<Block> blocks;
  for (size_t i = 0; i < num_strips; ++i) {
    const Strip& strip = strips[i];
    CutRows(strip.first, strip.height, sample.n, nullptr, strip.sum, sample.n - strip.first, blocks);
  }
  RunBlocks(kernel, sample, blocks, num_threads);
}

void UpperProduct(SyrkKernel kernel, const Sample& sample, float* product, size_t num_threads) {
  std::vector<Block> blocks;
  CutRows(0, sample.n, sample.n, product, nullptr, sample.n, blocks);
  RunBlocks(kernel, sample, blocks, num_threads);
}

}  // namespace halfbin
