#include "floats/linear.h"

#include <algorithm>
#include <cstring>

#include "cpu/scratch.h"
#include "cpu/threads.h"
#include "matmul/scalars.h"

namespace halfbin::floats {
namespace {

// Tokens of a tile: all of them, or as many as leave the fewest places empty. 16 tokens are four times 4, where three times 6 are 18.
size_t TileFor(size_t m) {
  if (m <= kMostTokens) return m;
  size_t best = kMostTokens;
  for (size_t tile = kMostTokens; tile >= kLeastTokens; --tile) {
    if ((m + tile - 1) / tile * tile < (m + best - 1) / best * best) best = tile;
  }
  return best;
}

constexpr size_t kPlacedTogether = 4;  // tiles of a task, where inputs are many

// Inputs of one tile, as Product::x has them: `to` [groups * padded][tile].
void PlaceTile(const Linear& linear, size_t first, size_t tile, float* to) {
  const Header& h = linear.weights.header;
  const size_t k = h.k, padded = linear.weights.padded, size = std::min<size_t>(h.group_size, k);
  std::memset(to, 0, linear.weights.groups * padded * tile * sizeof(float));
  for (size_t t = 0; t < tile && first + t < linear.m; ++t) {
    for (size_t column = 0; column < k; column += size) {
      float* group = to + column / size * padded * tile + t;
      const size_t columns = std::min(size, k - column);
      for (size_t c = 0; c < columns; c += 64) {
        alignas(64) float piece[64];
        const size_t here = std::min<size_t>(64, columns - c);
        matmul::Load(linear.x, (first + t) * k + column + c, here, piece);
        for (size_t i = 0; i < here; ++i) group[(c + i) * tile] = piece[i];
      }
    }
  }
}

}  // namespace

const InstructionSet* Find(const char* name) {
  if (std::strcmp(name, kPortable.name) == 0) return &kPortable;
#if defined(__x86_64__)
  if (std::strcmp(name, kAvx2.name) == 0) return &kAvx2;
  if (std::strcmp(name, kAvx512.name) == 0) return &kAvx512;
#endif
  return nullptr;
}

void Run(const Linear& linear, const InstructionSet& set, size_t num_threads) {
  const Weights& w = linear.weights;
  if (linear.m == 0 || w.num_panels == 0) return;
  const size_t tile = TileFor(linear.m), tiles = (linear.m + tile - 1) / tile;
  const size_t numbers = w.groups * w.padded * tile;
  // The caller's own part of the work uses the memory before the inputs.
  float* x = reinterpret_cast<float*>(Scratch(kProductMemory + tiles * numbers * sizeof(float)) + kProductMemory);
  ParallelFor(num_threads, (tiles + kPlacedTogether - 1) / kPlacedTogether, [&](size_t task) {
    const size_t first = task * kPlacedTogether, last = std::min(tiles, first + kPlacedTogether);
    for (size_t i = first; i < last; ++i) PlaceTile(linear, i * tile, tile, x + i * numbers);
  });
  const Product product{w, x, linear.m, tile, tiles, linear.bias, linear.y, linear.x.type};
  // A few tasks a thread: where another process holds up one thread, the others go on.
  const size_t tasks = std::min(w.num_panels, num_threads <= 1 ? 1 : num_threads * 4);
  ParallelFor(num_threads, tasks, [&](size_t task) {
    set.multiply(product, w.num_panels * task / tasks, w.num_panels * (task + 1) / tasks, Scratch(kProductMemory));
  });
}

void Dequantize(const Weights& weights, size_t first, size_t last, Float type, void* out, const InstructionSet& set, size_t num_threads) {
  const size_t stride = (last - first) * kPanelRows, bytes = type == Float::kFloat32 ? 4 : 2;
  ParallelFor(num_threads, last - first, [&](size_t i) {
    uint8_t* here = static_cast<uint8_t*>(out) + i * kPanelRows * bytes;
    set.dequantize(weights, first + i, type, here, stride, Scratch(kProductMemory));
  });
}

}  // namespace halfbin::floats
