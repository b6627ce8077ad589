// How a quantized weight lies in memory for the products. Made at load by Pack, never written to disk.
//
// A weight is [n, k] codes in groups of `group_size` columns (all k of them when there is one scale a row; the last group may be
// shorter). Rows are cut into panels of 64; the last panel is filled up with rows of codes 0 and scales 0, whose results nobody
// reads. Columns of a group are filled up to `padded`, a multiple of 32, and of 64 unless the group size is an odd multiple of 32;
// what a padding code is does not matter, as inputs are 0 there.
//
//   buffer:  Header (64 bytes) | panel 0 | panel 1 | ...          aligned to 64 bytes, as are all parts below
//   panel:   block of group 0 | block of group 1 | ...            one sequential stream for a thread
//   block:   codes | scales [64] | zeros uint8 [64], if any | sums int32 [64], if any
//
//   codes of 8 bits, 64 * padded bytes:      byte (c / 4) * 256 + r * 4 + c % 4                  is row r, column c of the group
//   codes of 4 bits, 64 * padded / 2 bytes:  byte (c / 8) * 256 + r * 4 + c % 4, its low nibble  when c % 8 < 4, else the high one
//   codes of 2 bits, 64 * padded / 4 bytes:  byte (c / 16) * 256 + r * 4 + c % 4, its bits 2 * (c % 16 / 4) and the next
//
// so that 64 bytes hold four neighbouring columns of 16 rows, one 32-bit lane each. Stored codes u are unsigned: code - least code of
// the format, or, of 4 bits with a table, an index: then the table's byte takes the place of u in all that follows. w_hat = scale * (u - z) with z = zero point - least code: one constant, or one for each row and group.
// sums[r] is the sum of u - z over the columns of the group, padding left out: what an input's zero point is multiplied by.
#pragma once

#include <cstddef>
#include <cstdint>

namespace halfbin::matmul {

constexpr size_t kPanelRows = 64;
constexpr size_t kHeaderBytes = 64;

enum class Float : uint32_t { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

struct Header {
  uint32_t magic, bits;  // bits: of a stored code, 2, 4 or 8
  uint64_t n, k, group_size;
  Float scale_type;
  uint32_t has_zeros, has_sums;
  int32_t zero;       // z, where it is one constant
  uint8_t table[16];  // of codes of 4 bits; all zeros: there is none
};
constexpr uint32_t kMagic = 0x68624d31;
static_assert(sizeof(Header) <= kHeaderBytes);

// What follows from a header, and where the panels are.
struct Weights {
  Header header;
  bool has_table;
  size_t groups, padded;                                  // columns of a group as stored
  size_t code_bytes, zeros_at, sums_at, block_bytes;      // of a block, offsets from its start; scales are at code_bytes
  size_t num_panels, panel_bytes, bytes;                  // bytes: of the whole buffer
  const uint8_t* panels;
};

// `buffer` may be null: then only sizes are wanted.
Weights View(const Header& header, const uint8_t* buffer);

// Codes and how to read them, as they come from outside.
struct Source {
  const uint8_t* codes;     // [n, k], int8 or uint8, rows `k` apart
  int32_t least;            // the least code of the format; codes - least is 0 to 2**bits - 1
  const void* scales;       // header.scale_type [n, groups]
  const int32_t* zero_points;  // [n, groups], in code units; null where header.has_zeros is 0
};

// Fill a buffer of View(header, nullptr).bytes bytes, aligned to 64, on up to num_threads threads.
void Pack(const Header& header, const Source& source, uint8_t* buffer, size_t num_threads);

// u of one column of a block's group, looked up where there is a table, for all rows of its panel.
void ColumnOfCodes(const Weights& weights, const uint8_t* block, size_t column, uint8_t* out);

// Where Unpack writes: what a Source would hold.
struct Target {
  uint8_t* codes;        // [n, k]
  int32_t least;         // what to add to u, so that codes are those of the Source
  void* scales;          // header.scale_type [n, groups]
  int32_t* zero_points;  // [n, groups], in code units; null where header.has_zeros is 0
};

// The inverse of Pack, on up to num_threads threads: every code, scale and zero point as it was, bit for bit.
void Unpack(const Weights& weights, const Target& target, size_t num_threads);

}  // namespace halfbin::matmul
