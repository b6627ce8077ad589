#include "norms/norms.h"

#include <algorithm>
#include <cstring>

#include "cpu/threads.h"

namespace halfbin {
namespace {

// Numbers that a task takes: less is done sooner by one thread than another one is woken.
constexpr size_t kNumbers = 32768;

}  // namespace

RmsNormKernel RmsNormOf(const char* instruction_set) {
  if (std::strcmp(instruction_set, "portable") == 0) return kRmsNormPortable;
#if defined(__x86_64__)
  if (std::strcmp(instruction_set, "avx2") == 0) return kRmsNormAvx2;
  if (std::strcmp(instruction_set, "avx512") == 0) return kRmsNormAvx512;
#endif
  return nullptr;
}

void RunRmsNorm(RmsNormKernel kernel, const RmsNorm& norm, size_t num_threads) {
  const size_t rows = std::max<size_t>(1, kNumbers / std::max<size_t>(1, norm.n)), tasks = (norm.m + rows - 1) / rows;
  if (tasks <= 1) return kernel(norm, 0, norm.m);
  ParallelFor(num_threads, tasks, [&](size_t task) { kernel(norm, task * rows, std::min(norm.m, (task + 1) * rows)); });
}

}  // namespace halfbin
