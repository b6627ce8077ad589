#include "matmul/linear.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "cpu/caches.h"
#include "cpu/features.h"
#include "cpu/scratch.h"
#include "cpu/threads.h"

namespace halfbin::matmul {
namespace {

struct Candidate {
  const InstructionSet* set;
  const char* feature;  // that the processor must have; null: none
  size_t least_tokens;  // below which the next one is faster
};

// From how many tokens on the tile registers win over the vector registers. Measured on a Xeon, one thread, 4096 x 4096: 4 tokens take
// 0.99 ms in tiles and 0.95 without at int4, 1.60 and 1.55 at int8; 8 tokens 1.08 and 1.12, 1.66 and 1.86.
constexpr size_t kLeastTokensForTiles = 5;

std::vector<Candidate> Usable() {
  const Candidate all[] = {{AmxInt8(), "amx_int8", kLeastTokensForTiles},
                           {Avx512Vnni(), "avx512_vnni", 0},
                           {AvxVnni(), "avx_vnni", 0},
                           {Avx2(), "avx2", 0},
                           {NeonI8mm(), "neon_i8mm", 0},
                           {NeonDotprod(), "neon_dotprod", 0},
                           {Portable(), nullptr, 0}};
  const std::vector<std::string> here = CpuFeatures();
  std::vector<Candidate> usable;
  for (const Candidate& c : all) {
    if (c.set == nullptr) continue;
    if (c.feature == nullptr || std::find(here.begin(), here.end(), c.feature) != here.end()) usable.push_back(c);
  }
  return usable;
}

const std::vector<Candidate>& Candidates() {
  static const std::vector<Candidate> usable = Usable();
  return usable;
}

}  // namespace

std::vector<std::string> InstructionSets() {
  std::vector<std::string> names;
  for (const Candidate& c : Candidates()) names.emplace_back(c.set->name);
  return names;
}

const InstructionSet* Find(const char* name, size_t m) {
  for (const Candidate& c : Candidates()) {
    if (name == nullptr ? m >= c.least_tokens : std::strcmp(name, c.set->name) == 0) return c.set;
  }
  return nullptr;
}

Cut CutFor(size_t m, const InstructionSet& set, const Weights& weights) {
  // As few tokens a tile as fill the tiles that the largest gives: 7 tokens are 4 and 3 where 6 go into one.
  const size_t tiles = (m + set.most_tokens - 1) / set.most_tokens;
  return {(m + tiles - 1) / tiles, set.run == 64 && weights.padded % 64 != 0 ? 32 : set.run};
}

size_t Run(const Linear& linear, const InstructionSet& set, size_t num_threads) {
  if (linear.m == 0 || linear.weights.header.n == 0) return 0;
  const Weights& w = linear.weights;
  const auto [tile, run] = CutFor(linear.m, set, w);
  // The caller's own part of the work uses the memory before the inputs.
  uint8_t* memory = Scratch(kProductMemory + InputBytes(linear.m, tile, w));
  const Product product{w, PlaceInputs(linear.m, tile, run, w, HasZeros(linear.grid), memory + kProductMemory), linear.bias,
                        linear.y, linear.y_type, SecondCacheBytes() / 4 * 3};
  const size_t tokens = product.inputs.tiles * tile;
  std::atomic<size_t> odd{0};
  ParallelFor(num_threads, (tokens + kRoundedTogether - 1) / kRoundedTogether, [&](size_t task) {
    const size_t first = task * kRoundedTogether, last = std::min(tokens, first + kRoundedTogether);
    odd.fetch_add(set.round(linear.x, linear.grid, product, first, last), std::memory_order_relaxed);
  });
  // A few tasks a thread: where another process holds up one thread, the others go on.
  const size_t tasks = std::min(w.num_panels, num_threads <= 1 ? 1 : num_threads * 4);
  ParallelFor(num_threads, tasks, [&](size_t task) {
    const size_t first = w.num_panels * task / tasks, last = w.num_panels * (task + 1) / tasks;
    set.multiply(product, first, last, Scratch(kProductMemory));
  });
  return odd.load();
}

}  // namespace halfbin::matmul
