// The product of `product.h`, included once by each instruction set, behind its lanes. HALFBIN_TARGET is the namespace of that set,
// HALFBIN_FLOATS the name of what it provides, HALFBIN_DIRECT_TOKENS how many tokens multiply codes as they come; for more, a chunk of
// columns is converted first. HALFBIN_VECTORS: how many times sixteen rows the sums of these tokens take at once, HALFBIN_TILE_VECTORS
// those of a tile with a converted chunk.
#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "floats/product.h"
#include "matmul/scalars.h"

// Unrolls the loop that follows early enough for an array of sums to become registers.
#define HALFBIN_UNROLL _Pragma("GCC unroll 8")

namespace halfbin::HALFBIN_TARGET {
namespace {

using namespace floats;

constexpr size_t kVectors = kPanelRows / 16;  // of sixteen rows in a panel
constexpr size_t kAhead = 2048;               // bytes of codes that are asked for before their turn

// How codes become v. Each has kColumns, columns that kBytes bytes of a panel hold, and
//
//   Each<kFirst, kCount>(codes, use)     calls use(j, i, v) for these columns j, in their order for any one i, and kCount times sixteen
//                                        rows from kFirst * 16 on, i from 0

struct Looked {
  static constexpr size_t kColumns = 8, kBytes = 256;
  Table table;
  explicit Looked(const Header& header) : table(LoadTable(header.table)) {}

  template <size_t kFirst, size_t kCount, class Use>
  [[gnu::always_inline]] void Each(const uint8_t* codes, Use use) const {
    Column<0, kFirst, kCount>(codes, use), Column<1, kFirst, kCount>(codes, use);
    Column<2, kFirst, kCount>(codes, use), Column<3, kFirst, kCount>(codes, use);
    Column<4, kFirst, kCount>(codes, use), Column<5, kFirst, kCount>(codes, use);
    Column<6, kFirst, kCount>(codes, use), Column<7, kFirst, kCount>(codes, use);
  }

 private:
  template <size_t kColumn, size_t kFirst, size_t kCount, class Use>
  [[gnu::always_inline]] void Column(const uint8_t* codes, Use use) const {
    HALFBIN_UNROLL
    for (size_t i = 0; i < kCount; ++i) use(kColumn, i, LookUp(table, ShiftRight<4 * kColumn>(LoadInts(codes + (kFirst + i) * 64))));
  }
};

// Two codes in a word of 16 bits; Low and High give the float16 of either.
template <class Codes>
struct Float8 {
  static constexpr size_t kColumns = 2, kBytes = 128;
  explicit Float8(const Header&) {}

  template <size_t kFirst, size_t kCount, class Use>
  [[gnu::always_inline]] void Each(const uint8_t* codes, Use use) const {
    static_assert(kFirst % 2 == 0 && kCount % 2 == 0);
    HALFBIN_UNROLL
    for (size_t i = 0; i < kCount; i += 2) {
      const Words both = LoadWords(codes + (kFirst + i) * 32);
      const Words low = Codes::Low(both), high = Codes::High(both);
      use(0, i, FirstFromFloat16(low)), use(0, i + 1, LastFromFloat16(low));
      use(1, i, FirstFromFloat16(high)), use(1, i + 1, LastFromFloat16(high));
    }
  }
};

struct E4m3 {
  [[gnu::always_inline]] static Words High(Words both) { return And(ShiftRightSigned<1>(both), 0xbf80); }
  [[gnu::always_inline]] static Words Low(Words both) { return High(ShiftLeft<8>(both)); }
};

struct E5m2 {
  [[gnu::always_inline]] static Words High(Words both) { return And(both, 0xff00); }
  [[gnu::always_inline]] static Words Low(Words both) { return ShiftLeft<8>(both); }
};

// What Convert made: float32 [columns][64].
struct Converted {
  static constexpr size_t kColumns = 1, kBytes = kPanelRows * sizeof(float);
  explicit Converted(const Header&) {}

  template <size_t kFirst, size_t kCount, class Use>
  [[gnu::always_inline]] void Each(const uint8_t* numbers, Use use) const {
    HALFBIN_UNROLL
    for (size_t i = 0; i < kCount; ++i) use(0, i, Load(reinterpret_cast<const float*>(numbers) + (kFirst + i) * 16));
  }
};

// Where the sums of a tile go: totals, as long as the group goes on; y, scaled, behind its last column.
struct Sums {
  bool begins, ends;
  float *totals, *y;  // [tile][64]
  const float* scales;  // [64]
  float unit;
};

// Some columns of a panel, rows from kFirst * 16 on, times those of T tokens.
template <class Codes, size_t T, size_t kFirst, size_t kCount>
[[gnu::always_inline]] inline void DotPart(const Codes& decode, const uint8_t* codes, size_t columns, const float* x, const Sums& sums) {
  Floats total[T][kCount];
  HALFBIN_UNROLL
  for (size_t t = 0; t < T; ++t) {
    HALFBIN_UNROLL
    for (size_t i = 0; i < kCount; ++i) {
      total[t][i] = sums.begins ? Set(0.0f) : Load(sums.totals + t * kPanelRows + (kFirst + i) * 16);
    }
  }
  for (size_t c = 0; c < columns; c += Codes::kColumns, codes += Codes::kBytes, x += Codes::kColumns * T) {
    if constexpr (!std::is_same_v<Codes, Converted>) {
      HALFBIN_UNROLL
      for (size_t b = kFirst * Codes::kBytes / 4; b < (kFirst + kCount) * Codes::kBytes / 4; b += 64) {
        __builtin_prefetch(codes + kAhead + b);
      }
    }
    decode.template Each<kFirst, kCount>(codes, [&](size_t j, size_t i, const Floats& v) __attribute__((always_inline)) {
      HALFBIN_UNROLL
      for (size_t t = 0; t < T; ++t) total[t][i] = MulAdd(Set(x[j * T + t]), v, total[t][i]);
    });
  }
  HALFBIN_UNROLL
  for (size_t t = 0; t < T; ++t) {
    HALFBIN_UNROLL
    for (size_t i = 0; i < kCount; ++i) {
      const size_t at = t * kPanelRows + (kFirst + i) * 16;
      if (sums.ends) {
        const Floats whole = Mul(total[t][i], Set(sums.unit));
        Store(sums.y + at, MulAdd(whole, Load(sums.scales + (kFirst + i) * 16), Load(sums.y + at)));
      } else {
        Store(sums.totals + at, total[t][i]);
      }
    }
  }
}

template <class Codes, size_t T, size_t kCount>
void Dot(const Header& header, const uint8_t* codes, size_t columns, const float* x, const Sums& sums) {
  const Codes decode(header);
  DotPart<Codes, T, 0, kCount>(decode, codes, columns, x, sums);
  if constexpr (kCount == 1) DotPart<Codes, T, 1, kCount>(decode, codes, columns, x, sums);
  if constexpr (kCount <= 2) DotPart<Codes, T, 2, kCount>(decode, codes, columns, x, sums);
  if constexpr (kCount == 1) DotPart<Codes, T, 3, kCount>(decode, codes, columns, x, sums);
}

// v of some columns, float32 [columns][64].
template <class Codes>
void Convert(const Header& header, const uint8_t* codes, size_t columns, float* out) {
  const Codes decode(header);
  for (size_t c = 0; c < columns; c += Codes::kColumns, codes += Codes::kBytes, out += Codes::kColumns * kPanelRows) {
    decode.template Each<0, kVectors>(codes, [&](size_t j, size_t i, const Floats& v) __attribute__((always_inline)) {
      Store(out + j * kPanelRows + i * 16, v);
    });
  }
}

using DotFunction = void (*)(const Header&, const uint8_t*, size_t, const float*, const Sums&);
using ConvertFunction = void (*)(const Header&, const uint8_t*, size_t, float*);

template <class Codes, size_t kCount, size_t kTokens>
DotFunction DotFor(size_t tokens) {
  if constexpr (kTokens == 0) {
    return nullptr;
  } else {
    return tokens == kTokens ? &Dot<Codes, kTokens, kCount> : DotFor<Codes, kCount, kTokens - 1>(tokens);
  }
}

DotFunction DirectDot(Kind kind, size_t tokens) {
  if (kind == Kind::kTable) return DotFor<Looked, HALFBIN_VECTORS, HALFBIN_DIRECT_TOKENS>(tokens);
  if (kind == Kind::kE4m3) return DotFor<Float8<E4m3>, HALFBIN_VECTORS, HALFBIN_DIRECT_TOKENS>(tokens);
  return DotFor<Float8<E5m2>, HALFBIN_VECTORS, HALFBIN_DIRECT_TOKENS>(tokens);
}

ConvertFunction ConvertFor(Kind kind) {
  return kind == Kind::kTable ? &Convert<Looked> : kind == Kind::kE4m3 ? &Convert<Float8<E4m3>> : &Convert<Float8<E5m2>>;
}

// The scales of a block as float32.
inline void LoadScales(const Weights& w, const uint8_t* block, float* out) {
  HALFBIN_UNROLL
  for (size_t r = 0; r < kPanelRows; r += 16) {
    const uint16_t* narrow = reinterpret_cast<const uint16_t*>(block) + r;
    if (w.header.scale_type == Float::kFloat32) {
      Store(out + r, Load(reinterpret_cast<const float*>(block) + r));
    } else {
      Store(out + r, w.header.scale_type == Float::kFloat16 ? FromFloat16(narrow) : FromBfloat16(narrow));
    }
  }
}

class Multiplier {
 public:
  Multiplier(const Product& product, uint8_t* memory)
      : p_(product),
        y_(reinterpret_cast<float*>(memory)),
        totals_(y_ + kTokenBlock * kPanelRows),
        converted_(totals_ + kTokenBlock * kPanelRows),
        direct_(p_.tiles == 1 ? DirectDot(p_.weights.header.kind, p_.tile) : nullptr),
        dot_(direct_ ? direct_ : DotFor<Converted, HALFBIN_TILE_VECTORS, kMostTokens>(p_.tile)),
        convert_(ConvertFor(p_.weights.header.kind)) {}

  void Run(size_t first, size_t last) {
    // Blocks of about the same size: a last one of a tile would go through all codes for little.
    const size_t most = kTokenBlock / p_.tile, blocks = (p_.tiles + most - 1) / most;
    for (size_t i = 0; i < blocks; ++i) {
      first_tile_ = p_.tiles * i / blocks, end_tile_ = p_.tiles * (i + 1) / blocks;
      for (size_t panel = first; panel < last; ++panel) {
        std::memset(y_, 0, (end_tile_ - first_tile_) * p_.tile * kPanelRows * sizeof(float));
        for (size_t g = 0; g < p_.weights.groups; ++g) Group(panel, g);
        Finish(panel);
      }
    }
  }

 private:
  void Group(size_t panel, size_t g) {
    const Weights& w = p_.weights;
    const uint8_t* block = w.panels + panel * w.panel_bytes + g * w.block_bytes;
    alignas(64) float scales[kPanelRows];
    LoadScales(w, block, scales);
    // As many bytes as the scales have lie between what the group before asked for and what this one will.
    for (size_t b = 0; b < w.codes_at; b += 64) __builtin_prefetch(block + kAhead + b);
    const size_t most = direct_ ? w.padded : kColumnChunk, row_bytes = w.groups * w.padded * p_.tile;
    const size_t column_bytes = kPanelRows * CodeBits(w.header.kind) / 8;
    for (size_t c = 0; c < w.padded; c += most) {
      const size_t columns = std::min(most, w.padded - c);
      const uint8_t* codes = block + w.codes_at + c * column_bytes;
      if (!direct_) convert_(w.header, codes, columns, converted_);
      // While tiles share a chunk, what follows it comes from memory, a slice at each call.
      const size_t slice = direct_ ? 0 : (kColumnChunk * column_bytes / 64 / (end_tile_ - first_tile_) + 1) * 64;
      const uint8_t* next = codes + columns * column_bytes;
      for (size_t tile = first_tile_; tile < end_tile_; ++tile) {
        for (const uint8_t* end = next + slice; next < end; next += 64) __builtin_prefetch(next, 0, 2);
        const size_t at = (tile - first_tile_) * p_.tile * kPanelRows;
        dot_(w.header, direct_ ? codes : reinterpret_cast<const uint8_t*>(converted_), columns,
             p_.x + tile * row_bytes + (g * w.padded + c) * p_.tile,
             {c == 0, c + columns == w.padded, totals_ + at, y_ + at, scales, Unit(w.header.kind)});
      }
    }
  }

  // Rows of a panel of y, with bias, to where they belong.
  void Finish(size_t panel) {
    const Weights& w = p_.weights;
    const size_t n = w.header.n, first = panel * kPanelRows, rows = std::min(kPanelRows, n - first);
    const uint8_t* not_numbers = w.not_numbers + first;
    alignas(64) float bias[kPanelRows] = {}, row[kPanelRows];
    if (p_.bias.data != nullptr) matmul::Load(p_.bias, first, rows, bias);
    if (w.header.has_not_numbers) {
      for (size_t r = 0; r < rows; ++r) bias[r] = not_numbers[r] ? std::numeric_limits<float>::quiet_NaN() : bias[r];
    }
    const bool adds = p_.bias.data != nullptr || w.header.has_not_numbers;  // -0 + 0 would be 0
    const float* y = y_;
    for (size_t t = first_tile_ * p_.tile; t < std::min(end_tile_ * p_.tile, p_.m); ++t, y += kPanelRows) {
      const size_t at = t * n + first;
      uint16_t narrow[kPanelRows];
      HALFBIN_UNROLL
      for (size_t r = 0; r < kPanelRows; r += 16) {
        const Floats numbers = adds ? Add(Load(y + r), Load(bias + r)) : Load(y + r);
        if (p_.y_type == Float::kFloat32) {
          Store(row + r, numbers);
        } else {
          StoreBfloat16(narrow + r, numbers);
        }
      }
      if (p_.y_type == Float::kFloat32) {
        std::memcpy(static_cast<float*>(p_.y) + at, row, rows * sizeof(float));
      } else {
        std::memcpy(static_cast<uint16_t*>(p_.y) + at, narrow, rows * sizeof(uint16_t));
      }
    }
  }

  const Product& p_;
  float *y_, *totals_, *converted_;
  DotFunction direct_, dot_;  // direct_ is null where chunks are converted first
  ConvertFunction convert_;
  size_t first_tile_ = 0, end_tile_ = 0;
};

void Multiply(const Product& product, size_t first, size_t last, uint8_t* memory) { Multiplier(product, memory).Run(first, last); }

// Marks NaN of e4m3, which the conversion reads as 480, among v of some columns, float32 [columns][64].
void PutNotNumbers(const uint8_t* codes, size_t columns, const uint8_t* not_numbers, float* numbers) {
  for (size_t r = 0; r < kPanelRows; ++r) {
    if (!not_numbers[r]) continue;
    for (size_t c = 0; c < columns; ++c) {
      const bool marked = (codes[c / 2 * 128 + r * 2 + c % 2] & 0x7f) == 0x7f;
      if (marked) numbers[c * kPanelRows + r] = std::numeric_limits<float>::quiet_NaN();
    }
  }
}

void Dequantize(const Weights& w, size_t panel, Float type, void* out, size_t stride, uint8_t* memory) {
  float* numbers = reinterpret_cast<float*>(memory);
  const ConvertFunction convert = ConvertFor(w.header.kind);
  const size_t column_bytes = kPanelRows * CodeBits(w.header.kind) / 8, k = w.header.k;
  const Floats unit = Set(Unit(w.header.kind));
  for (size_t g = 0; g < w.groups; ++g) {
    const uint8_t* block = w.panels + panel * w.panel_bytes + g * w.block_bytes;
    alignas(64) float scales[kPanelRows];
    LoadScales(w, block, scales);
    const size_t real = std::min<size_t>(w.header.group_size, k - g * w.header.group_size);
    for (size_t c = 0; c < real; c += kColumnChunk) {
      const size_t columns = std::min(kColumnChunk, real - c), stored = std::min(kColumnChunk, w.padded - c);
      const uint8_t* codes = block + w.codes_at + c * column_bytes;
      convert(w.header, codes, stored, numbers);
      if (w.header.has_not_numbers) PutNotNumbers(codes, columns, w.not_numbers + panel * kPanelRows, numbers);
      for (size_t j = 0; j < columns; ++j) {
        const size_t at = (g * w.header.group_size + c + j) * stride;
        HALFBIN_UNROLL
        for (size_t r = 0; r < kPanelRows; r += 16) {
          const Floats w_hat = Mul(Mul(Load(numbers + j * kPanelRows + r), unit), Load(scales + r));
          if (type == Float::kFloat32) {
            Store(static_cast<float*>(out) + at + r, w_hat);
          } else {
            StoreBfloat16(static_cast<uint16_t*>(out) + at + r, w_hat);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace halfbin::HALFBIN_TARGET

namespace halfbin::floats {

const InstructionSet HALFBIN_FLOATS{HALFBIN_NAME, &HALFBIN_TARGET::Multiply, &HALFBIN_TARGET::Dequantize};

}  // namespace halfbin::floats
