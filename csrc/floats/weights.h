// How a weight whose codes stand for floats lies in memory for its products. Made at load by Pack, never written to disk.
//
// A weight is [n, k] codes in groups of `group_size` columns (all k of them when there is one scale a row; the last group may be
// shorter). Rows are cut into panels of 64; the last panel is filled up with rows of codes 0 and scales 0, whose results nobody reads.
// Columns of a group are filled up to `padded`, a multiple of 8, with codes 0: inputs are 0 there.
//
//   buffer:  Header (128 bytes) | panel 0 | panel 1 | ... | not_numbers          aligned to 64 bytes, as are all parts below
//   panel:   block of group 0 | block of group 1 | ...                            one sequential stream for a thread
//   block:   scales [64] | codes                                                  in the order in which they are read
//
//   kTable, 64 * padded / 2 bytes:   byte (c / 8) * 256 + r * 4 + c % 8 / 2 is row r, column c of the group, its low nibble where c
//                                    is even, else the high one: eight columns of a row in a 32-bit lane, sixteen rows in 64 bytes
//   FP8, 64 * padded bytes:          byte (c / 2) * 128 + r * 2 + c % 2: two columns of a row in a word of 16 bits
//   not_numbers, 64 for each panel:  uint8, 1 where a row holds a NaN of e4m3
//
// w_hat = scale * value(code). What a code's value is:
//
//   kTable   table[code], any sixteen finite floats
//   kE5m2    s eeeee mm is the upper byte of the float16 of the same value, infinities and NaN included
//   kE4m3    s eeee mmm with its exponent and mantissa moved down by one bit behind its sign, s 0eeee mmm 0000000, is a float16 whose
//            bias is 15 in place of 7: 2^-8 times the value, and subnormal where the code is. So `unit` is 2^8. S.1111.111, which is
//            NaN, would be 480; a row that holds it gives NaN to every token, whatever the inputs are (NaN * 0 is NaN), so the row is
//            marked in not_numbers, and no product looks.
#pragma once

#include <cstddef>
#include <cstdint>

#include "matmul/product.h"

namespace halfbin::floats {

using matmul::Float;
using matmul::kPanelRows;
using matmul::Tensor;

enum class Kind : uint32_t { kTable = 0, kE4m3 = 1, kE5m2 = 2 };

constexpr size_t kHeaderBytes = 128;
constexpr size_t kColumnStep = 8;  // divides `padded`

struct Header {
  uint32_t magic;
  Kind kind;
  uint64_t n, k, group_size;
  Float scale_type;
  uint32_t num_values;  // of the table; codes are below
  uint32_t has_not_numbers, reserved;
  float table[16];
};
constexpr uint32_t kMagic = 0x68624631;
static_assert(sizeof(Header) <= kHeaderBytes);

// What follows from a header, and where the parts are.
struct Weights {
  Header header;
  size_t groups, padded;           // columns of a group as stored
  size_t codes_at, block_bytes;    // of a block; scales are at 0
  size_t num_panels, panel_bytes, bytes;  // bytes: of the whole buffer
  const uint8_t* panels;
  const uint8_t* not_numbers;
};

inline size_t CodeBits(Kind kind) { return kind == Kind::kTable ? 4 : 8; }
inline float Unit(Kind kind) { return kind == Kind::kE4m3 ? 0x1p8f : 1.0f; }

// `buffer` may be null: then only sizes are wanted.
Weights View(const Header& header, const uint8_t* buffer);

// Codes and scales as they come from outside.
struct Source {
  const uint8_t* codes;  // [n, k], rows `k` apart
  const void* scales;    // header.scale_type [n, groups]
};

// Fill a buffer of View(header, nullptr).bytes bytes, aligned to 64, on up to num_threads threads. Returns how many codes are none of
// the table's; then the buffer holds no weight.
size_t Pack(const Header& header, const Source& source, uint8_t* buffer, size_t num_threads);

// Where Unpack writes: what a Source would hold.
struct Target {
  uint8_t* codes;
  void* scales;
};

// The inverse of Pack, on up to num_threads threads: every code and scale as it was, bit for bit.
void Unpack(const Weights& weights, const Target& target, size_t num_threads);

}  // namespace halfbin::floats
