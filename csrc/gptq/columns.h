// GPTQ's loop over a few columns of a weight: round one, divide its error by its pivot, take its share from those behind it.
//
//   columns  [num_columns, num_rows]   float32, columns of the weight in the order of rounding, any alignment; the first
//                                      `num_rounded` of them give way to their errors, divided by their pivots
//   upper    [num_columns, upper_stride]  row j: what an error of column j, divided by its pivot, takes from column k > j, at k;
//                                      the pivot at j. Nothing before it is read
//   scale    [num_tiles, per_row]      float32, > 0: per_row is num_rows, or 1 where all rows share one
//   zero     likewise, integers as float32; or nullptr for 0
//   tiles    [num_rounded]             the tile of each column that is rounded
//   codes    [num_rounded, codes_stride]  a byte each
//
// An error's share is taken away by a fused multiplication and addition, rounded once, on every instruction set: all give the
// same bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "rounding/rounding.h"

namespace halfbin {

struct Columns {
  float* columns;
  size_t num_columns, num_rounded, num_rows;
  const float* upper;
  size_t upper_stride;
  const float* scale;
  const float* zero;
  size_t per_row;
  const int64_t* tiles;
  uint8_t* codes;
};

constexpr size_t kMostColumns = 128;  // of them, 64 rows at a time are worked on in the first-level cache

using RoundColumnsKernel = void (*)(const Columns& columns, const CodeFormat& format);

extern const RoundColumnsKernel kRoundColumnsPortable;
#if defined(__x86_64__)
extern const RoundColumnsKernel kRoundColumnsAvx2, kRoundColumnsAvx512;
#endif

// "portable", "avx2" or "avx512"; nullptr where this build has no such loop. The processor is not asked.
RoundColumnsKernel RoundColumnsOf(const char* instruction_set);

}  // namespace halfbin
