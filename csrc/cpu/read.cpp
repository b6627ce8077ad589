#include "cpu/read.h"

#include <atomic>
#include <cstring>

#include "cpu/threads.h"

namespace halfbin {

uint64_t StreamingRead(const uint8_t* memory, size_t bytes, size_t num_threads) {
  constexpr size_t kAhead = 1024;  // bytes that are asked for before their turn, as in the products
  const size_t lines = bytes / 64;
  std::atomic<uint64_t> sum{0};
  ParallelFor(num_threads, num_threads, [&](size_t task) {
    uint64_t mine[8] = {};
    for (size_t i = lines * task / num_threads; i < lines * (task + 1) / num_threads; ++i) {
      uint64_t words[8];
      std::memcpy(words, memory + i * 64, 64);
      __builtin_prefetch(memory + i * 64 + kAhead);
      for (size_t j = 0; j < 8; ++j) mine[j] += words[j];
    }
    for (const uint64_t part : mine) sum.fetch_add(part, std::memory_order_relaxed);
  });
  return sum.load();
}

}  // namespace halfbin
