#include "cpu/streaming.h"

#include <atomic>

#include "cpu/threads.h"

namespace halfbin {
namespace {

constexpr size_t kAhead = 128;  // words, 1 KiB: how far ahead of use memory is asked for

uint64_t Sum(const uint64_t* words, size_t num_words) {
  uint64_t sums[16] = {};  // additions that do not wait for each other
  size_t i = 0;
  for (; i + 16 <= num_words; i += 16) {
    __builtin_prefetch(words + i + kAhead);
    __builtin_prefetch(words + i + kAhead + 8);
    for (size_t j = 0; j < 16; ++j) sums[j] += words[i + j];
  }
  uint64_t total = 0;
  for (; i < num_words; ++i) total += words[i];
  for (const uint64_t sum : sums) total += sum;
  return total;
}

}  // namespace

uint64_t ReadOnce(const uint64_t* words, size_t num_words, size_t num_threads) {
  const size_t shares = num_threads < 1 ? 1 : num_threads;
  std::atomic<uint64_t> total{0};
  ParallelFor(shares, shares, [&](size_t share) {
    const size_t first = num_words * share / shares, last = num_words * (share + 1) / shares;
    total.fetch_add(Sum(words + first, last - first), std::memory_order_relaxed);
  });
  return total.load();
}

}  // namespace halfbin
