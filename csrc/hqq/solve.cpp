#include "hqq/solve.h"

#include <cstring>
#include <vector>

#include "cpu/threads.h"

namespace halfbin {

SolveHqqKernel SolveHqqOf(const char* instruction_set) {
  if (std::strcmp(instruction_set, "portable") == 0) return kSolveHqqPortable;
#if defined(__x86_64__)
  if (std::strcmp(instruction_set, "avx2") == 0) return kSolveHqqAvx2;
  if (std::strcmp(instruction_set, "avx512") == 0) return kSolveHqqAvx512;
#endif
  return nullptr;
}

void SolveHqq(SolveHqqKernel kernel, const HqqTiles& tiles, const CodeFormat& format, ScaleType stored,
              const HqqSchedule& schedule, size_t num_threads) {
  constexpr size_t kTask = size_t{1} << 15;  // elements
  if (tiles.count == 0) return;
  const size_t height = tiles.count < kTask ? kTask / tiles.count : 1;
  ParallelFor(num_threads, (tiles.num_tiles + height - 1) / height, [&](size_t task) {
    const size_t first = task * height, left = tiles.num_tiles - first;
    std::vector<float> units(tiles.count);
    const HqqTiles some{tiles.tiles + first * tiles.count, left < height ? left : height, tiles.count, tiles.scale + first,
                        tiles.zero ? tiles.zero + first : nullptr};
    kernel(some, format, stored, schedule, units.data());
  });
}

}  // namespace halfbin
