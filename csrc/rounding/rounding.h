// Round to nearest where the elements that share a scale are runs of a row: one pass over the weights, from their range to codes
// or to packed bits. The arithmetic of an element is that of halfbin.numerics, operation for operation, hence its bits.
//
//   x       [num_rows, n]      float32, bfloat16 or float16, contiguous rows, any alignment
//   scale   [num_rows, tiles]  tiles = ceil(n / size): the last tile of a row may be shorter; finite, > 0
//   zero    [num_rows, tiles]  int32, or nullptr for 0
//   codes   [num_rows, n]      one byte each: integers (int8 or uint8), bit patterns of small floats, indices into a table
#pragma once

#include <cstddef>
#include <cstdint>

#include "packing/bits.h"

namespace halfbin {

enum class Element { kFloat32, kBfloat16, kFloat16 };
enum class CodeKind { kIntegers, kFloats, kTable };

// What codes stand for, in steps of the scale.
struct CodeFormat {
  CodeKind kind = CodeKind::kIntegers;
  int32_t qmin = 0, qmax = 0;                      // kIntegers: both allowed
  int mantissa_bits = 0, bias = 0, sign_bit = 0;  // kFloats: sign at that bit, exponent, mantissa; subnormals, ties to even
  float largest = 0;                              // kFloats: beyond it values are clipped to it
  int num_boundaries = 0;                         // kTable: a code is the number of boundaries below the value
  float boundaries[255] = {};
  float values[256] = {};  // kFloats and kTable: the value of each code
};

enum class Covers { kBothAlike, kPositive, kRange };  // max|x|; the greatest x; from the least to the greatest, by a zero point
enum class ScaleType { kFloat32, kFloat16, kBfloat16, kE8m0 };

// How a tile's scale follows from its range: (what is covered) / divisor, rounded to what is stored: up, or down for e8m0.
struct ScaleRule {
  Covers covers = Covers::kBothAlike;
  float divisor = 1;
  ScaleType stored = ScaleType::kFloat32;
};

// Of the elements of a tile, and of 0.
struct Range {
  float least, greatest;
  bool finite;  // all of them; the ends mean nothing otherwise
};

struct ErrorSums {
  double signal = 0, noise = 0;  // sums of x^2 and of (x_hat - x)^2, x_hat and the difference computed in float32
  float max_abs = 0;             // the largest |x_hat - x|
};

struct Rows {
  const void* x;
  Element element;
  size_t num_rows, n, size;
};

// Neighbouring tiles of one row, the last one perhaps shorter.
struct Run {
  const void* x;
  Element element;
  size_t count, size;
  const CodeFormat* format;
};

// One instruction set's loops.
struct RoundingKernels {
  const PackingKernels* packing;
  Range (*range)(const void* x, Element element, size_t count);
  // false: not all is finite, and what was written means nothing. `zero` is written where the rule covers kRange.
  // `sums`, unless null, are those of `compare`, to the bit.
  bool (*fit_and_round)(const Run& run, const ScaleRule& rule, uint8_t* codes, void* scale, int32_t* zero, ErrorSums* sums);
  // Codes of at most 4 bits at once as nibbles, counted from `lowest`; tiles begin at even places. nullptr where that is no
  // faster than packing bytes.
  bool (*fit_and_pack)(const Run& run, const ScaleRule& rule, uint8_t lowest, uint8_t* nibbles, void* scale, int32_t* zero,
                       ErrorSums* sums);
  void (*round)(const Run& run, const float* scale, const int32_t* zero, uint8_t* codes);
  ErrorSums (*compare)(const Run& run, const uint8_t* codes, const float* scale, const int32_t* zero);
  bool (*search)(const Run& run, const ScaleRule& rule, const float* factors, size_t num_factors, float* least,
                 float* greatest);
};

extern const RoundingKernels kRoundingPortable;
#if defined(__x86_64__)
extern const RoundingKernels kRoundingAvx2, kRoundingAvx512;
#endif

// "portable", "avx2" or "avx512"; nullptr where this build has no such loops. The processor is not asked.
const RoundingKernels* RoundingKernelsOf(const char* instruction_set);

// Where codes go: a byte each, or `bits` bits each, counted from `lowest`, in rows of `row_bytes` whose ends are filled with 0. Every
// code of the format fits into them.
struct CodesOut {
  uint8_t* bytes;
  int bits;  // 0: a byte each
  uint8_t lowest;
  size_t row_bytes;
};

// Scales, of the rule's type, and zero points that cover each tile's range, and the codes under them. false: not all is finite.
// `sums`, unless null, are those that `Compare` gives, in the same pass.
bool FitAndRound(const RoundingKernels& kernels, const Rows& rows, const CodeFormat& format, const ScaleRule& rule,
                 const CodesOut& codes, void* scale, int32_t* zero, size_t num_threads, ErrorSums* sums);

// The codes under given scales, float32; x finite.
void RoundWith(const RoundingKernels& kernels, const Rows& rows, const CodeFormat& format, const float* scale,
               const int32_t* zero, uint8_t* codes, size_t num_threads);

// How far values lie from what codes stand for: the same sums whatever the number of threads and the instruction set.
ErrorSums Compare(const RoundingKernels& kernels, const Rows& rows, const CodeFormat& format, const uint8_t* codes,
                  const float* scale, const int32_t* zero, size_t num_threads);

// The range of each tile, float32 [num_rows, tiles], with the least sum of (x_hat - x)^2 among its whole range and those shrunken by
// the factors: both ends together; where the rule covers kRange, then the low end and then the high end alone. The first of equals
// wins. false: not all is finite.
bool Search(const RoundingKernels& kernels, const Rows& rows, const CodeFormat& format, const ScaleRule& rule,
            const float* factors, size_t num_factors, float* least, float* greatest, size_t num_threads);

}  // namespace halfbin
