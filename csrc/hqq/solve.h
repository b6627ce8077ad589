// HQQ's alternation for tiles that fit into a cache: round under a scale, shrink the errors, move the scale (and zero point) to the
// least squares of the targets; methods/hqq.py says what is minimised and why. Each tile keeps the best it visits.
//
//   tiles  [num_tiles, count]  float32, finite, any alignment
//   scale  [num_tiles]         float32, as stored: where the alternation starts, and its unit; gives way to the best
//   zero   [num_tiles]         int32, likewise; or nullptr where there are no zero points
//
// |error|^p is computed in float32 by polynomials, within 2^-19 of itself for errors of 2^-16 to 2^16 steps. Sums run in float64, those
// of 64 neighbours in float32, in one order: every instruction set gives the same bits, and so does every number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "rounding/rounding.h"

namespace halfbin {

struct HqqSchedule {
  int iterations;
  float p;  // 0 < p <= 1
  double beta, growth;
};

struct HqqTiles {
  const float* tiles;
  size_t num_tiles, count;
  float* scale;
  int32_t* zero;
};

// `units` is room for `count` numbers.
using SolveHqqKernel = void (*)(const HqqTiles& tiles, const CodeFormat& format, ScaleType stored, const HqqSchedule& schedule,
                                float* units);

extern const SolveHqqKernel kSolveHqqPortable;
#if defined(__x86_64__)
extern const SolveHqqKernel kSolveHqqAvx2, kSolveHqqAvx512;
#endif

// "portable", "avx2" or "avx512"; nullptr where this build has no such loop. The processor is not asked.
SolveHqqKernel SolveHqqOf(const char* instruction_set);

void SolveHqq(SolveHqqKernel kernel, const HqqTiles& tiles, const CodeFormat& format, ScaleType stored,
              const HqqSchedule& schedule, size_t num_threads);

}  // namespace halfbin
