// The loop, included once by each instruction set, behind its lanes. HALFBIN_TARGET is the namespace of that set,
// HALFBIN_ROUND_COLUMNS the name of its loop.
#include <cstring>

#include "gptq/columns.h"
#include "rounding/codes_inl.h"

namespace halfbin::HALFBIN_TARGET {
namespace {

constexpr size_t kRows = 64;  // 32 KiB of 128 columns, copied out: rows of a column lie a power of two apart, and would meet in
                              // a few sets of the cache
constexpr size_t kVectors = kRows / 16;

// The scales or zero points of 16 rows from `row` on; those beyond the last row are `filler`.
inline Floats OfRows(const float* table, size_t per_row, size_t row, size_t num_rows, float filler) {
  if (per_row == 1) return Set(*table);
  if (row + 16 <= num_rows) return Load(table + row);
  float some[16];
  for (size_t i = 0; i < 16; ++i) some[i] = row + i < num_rows ? table[row + i] : filler;
  return Load(some);
}

template <class Codes>
void RoundRows(const Columns& c, const CodeFormat& format, size_t first, size_t height, float* block) {
  for (size_t j = 0; j < c.num_rounded; ++j) {
    float* const column = block + j * kRows;
    const float* const upper = c.upper + j * c.upper_stride;
    const size_t tile = static_cast<size_t>(c.tiles[j]) * c.per_row;
    const Floats pivot = Set(upper[j]);
    Floats error[kVectors];
    uint8_t codes[kRows];
    for (size_t v = 0; v < kVectors; ++v) {
      const size_t row = first + 16 * v;
      const Floats scale = OfRows(c.scale + tile, c.per_row, row, c.num_rows, 1.0f);
      const Floats zero = c.zero ? OfRows(c.zero + tile, c.per_row, row, c.num_rows, 0.0f) : Set(0);
      const Codes coding(format, Round(zero));
      const Floats x = Load(column + 16 * v);
      const Floats steps = Min(Max(Div(x, scale), Set(-kClipSteps)), Set(kClipSteps));
      const Ints found = coding.Encode(steps, x);
      StoreBytes(codes + 16 * v, found);
      error[v] = Div(Sub(x, Mul(coding.Decode(found), scale)), pivot);
      Store(column + 16 * v, error[v]);
    }
    std::memcpy(c.codes + j * c.num_rows + first, codes, height);
    for (size_t k = j + 1; k < c.num_columns; ++k) {
      float* const later = block + k * kRows;
      const Floats share = Set(upper[k]);
      for (size_t v = 0; v < kVectors; ++v) {
        Store(later + 16 * v, NegMulAdd(share, error[v], Load(later + 16 * v)));
      }
    }
  }
}

void RoundColumns(const Columns& c, const CodeFormat& format) {
  alignas(64) float block[kMostColumns * kRows] = {};
  for (size_t first = 0; first < c.num_rows; first += kRows) {
    const size_t height = c.num_rows - first < kRows ? c.num_rows - first : kRows;
    for (size_t k = 0; k < c.num_columns; ++k) {
      std::memcpy(block + k * kRows, c.columns + k * c.num_rows + first, height * sizeof(float));
    }
    switch (format.kind) {
      case CodeKind::kIntegers:
        RoundRows<IntegerCodes>(c, format, first, height, block);
        break;
      case CodeKind::kFloats:
        RoundRows<FloatCodes>(c, format, first, height, block);
        break;
      case CodeKind::kTable:
        RoundRows<TableCodes>(c, format, first, height, block);
        break;
    }
    for (size_t k = 0; k < c.num_columns; ++k) {
      std::memcpy(c.columns + k * c.num_rows + first, block + k * kRows, height * sizeof(float));
    }
  }
}

}  // namespace
}  // namespace halfbin::HALFBIN_TARGET

namespace halfbin {

const RoundColumnsKernel HALFBIN_ROUND_COLUMNS = HALFBIN_TARGET::RoundColumns;

}  // namespace halfbin
