// The loop of norms.h, included once by each instruction set, behind its lanes. HALFBIN_TARGET is the namespace of that set,
// HALFBIN_RMS_NORM the name of its loop.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "norms/norms.h"

namespace halfbin::HALFBIN_TARGET {
namespace {

// Sixteen numbers, or the first `count` of them and zeros, from either type and to it.
struct Float32 {
  using Number = float;
  static Floats From(const float* p, size_t count) { return count == 16 ? Load(p) : LoadFirst(p, count); }
  static Floats Rounded(Floats x) { return x; }
  static void To(float* p, Floats x, size_t count) { count == 16 ? Store(p, x) : StoreFirst(p, x, count); }
};

struct Bfloat16 {
  using Number = uint16_t;
  static Floats From(const uint16_t* p, size_t count) {
    if (count == 16) return FromBfloat16(p);
    uint16_t numbers[16] = {};
    std::memcpy(numbers, p, count * sizeof *p);
    return FromBfloat16(numbers);
  }
  // To nearest, half to even. A NaN stays one: it came from 16 bits, or from an operation that sets the highest bit of its fraction.
  static Floats Rounded(Floats x) {
    const Ints bits = Bits(x), odd = And(ShiftRight(bits, 16), SetInt(1));
    return FromBits(And(Add(bits, Add(odd, SetInt(0x7fff))), SetInt(static_cast<int32_t>(0xffff0000u))));
  }
  static void To(uint16_t* p, Floats x, size_t count) {
    uint32_t bits[16];
    float numbers[16];
    Store(numbers, Rounded(x));
    std::memcpy(bits, numbers, sizeof bits);
    uint16_t halves[16];
    for (size_t i = 0; i < 16; ++i) halves[i] = static_cast<uint16_t>(bits[i] >> 16);
    if (count == 16) {
      std::memcpy(p, halves, sizeof halves);
    } else {
      std::memcpy(p, halves, count * sizeof *p);
    }
  }
};

inline size_t Left(size_t n, size_t i) { return n - i < 16 ? n - i : 16; }

template <class Type>
void NormRows(const RmsNorm& norm, size_t first, size_t last) {
  using Number = typename Type::Number;
  const Number* const weight = static_cast<const Number*>(norm.weight);
  const size_t n = norm.n;
  for (size_t row = first; row < last; ++row) {
    const Number* const x = static_cast<const Number*>(norm.x) + row * n;
    Number* const y = static_cast<Number*>(norm.y) + row * n;
    Doubles sum = ZeroSums();
    for (size_t i = 0; i < n; i += 16) {
      const Floats number = Type::From(x + i, Left(n, i));
      AddProductTo(sum, number, number);
    }
    const float mean = static_cast<float>(Total(sum) / static_cast<double>(n));
    const Floats scale = Set(1.0f / std::sqrt(mean + norm.eps));
    for (size_t i = 0; i < n; i += 16) {
      const size_t count = Left(n, i);
      const Floats scaled = Mul(Type::From(x + i, count), scale), w = Type::From(weight + i, count);
      Type::To(y + i, norm.one_plus ? Mul(scaled, Add(Set(1.0f), w)) : Mul(w, Type::Rounded(scaled)), count);
    }
  }
}

void NormRowsOfAny(const RmsNorm& norm, size_t first, size_t last) {
  (norm.bfloat16 ? &NormRows<Bfloat16> : &NormRows<Float32>)(norm, first, last);
}

}  // namespace
}  // namespace halfbin::HALFBIN_TARGET

namespace halfbin {

const RmsNormKernel HALFBIN_RMS_NORM = &HALFBIN_TARGET::NormRowsOfAny;

}  // namespace halfbin
