// Quotients and codes of sixteen elements: included once by each instruction set, behind its lanes. HALFBIN_TARGET is the
// namespace of that set.
//
// The quotient decides ties, so it must be the correctly rounded one. Dividing takes 10 to 16 cycles for sixteen lanes; with
// y + z = 1 / scale to twice the precision, x * y + x * z is off by little more than half a unit in the last place, and one step
// of Newton's, whose remainder is exact, rounds it correctly (Markstein 1990, "Computation of elementary functions on the IBM
// RISC System/6000 processor", theorem on the final step). That needs room for the remainder's bits: the scale neither huge nor
// tiny and the quotient below 2^17. Quotients that are too small for it round to 0 in every format, whatever their last bit.
#include "rounding/rounding.h"

namespace halfbin::HALFBIN_TARGET {

constexpr float kClipSteps = 131072.0f;  // 2^17: beyond every format's range, and small enough for `Round`

struct Element16 {
  uint16_t bits;
};
struct Bfloat16Number : Element16 {};
struct Float16Number : Element16 {};

inline Floats LoadNumbers(const float* p) { return Load(p); }
inline Floats LoadNumbers(const Bfloat16Number* p) { return FromBfloat16(&p->bits); }
inline Floats LoadNumbers(const Float16Number* p) { return FromFloat16(&p->bits); }
inline Floats LoadNumbers(const float* p, size_t count) { return LoadFirst(p, count); }
template <class T>
inline Floats LoadNumbers(const T* p, size_t count) {
  T padded[16] = {};
  std::memcpy(padded, p, count * sizeof(T));
  return LoadNumbers(padded);
}

// x / scale for the elements of one tile, correctly rounded where it matters and clipped to +-2^17.
class Quotients {
 public:
  Quotients(float scale, float largest_abs) : scale_(Set(scale)) {
    fast_ = kHasFma && scale > 0x1p-64f && scale < 0x1p64f && largest_abs < scale * kClipSteps;
    if constexpr (kHasFma) {
      const float inverse = 1.0f / scale;
      inverse_ = Set(inverse);
      rest_ = Mul(NegMulAdd(scale_, inverse_, Set(1.0f)), inverse_);
    }
  }
  bool fast() const { return fast_; }
  Floats Fast(Floats x) const {
    const Floats q = MulAdd(x, inverse_, Mul(x, rest_));
    return MulAdd(NegMulAdd(q, scale_, x), inverse_, q);
  }
  Floats Exact(Floats x) const { return Min(Max(Div(x, scale_), Set(-kClipSteps)), Set(kClipSteps)); }

 private:
  Floats scale_, inverse_, rest_;
  bool fast_;
};

class IntegerCodes {
 public:
  IntegerCodes(const CodeFormat& format, Ints zero) : zero_(zero), qmin_(SetInt(format.qmin)), qmax_(SetInt(format.qmax)) {}
  // Rounded before the zero point is added, so that 0.0 and the ties do not depend on it.
  Ints Encode(Floats steps, Floats) const { return Min(Max(Add(Round(steps), zero_), qmin_), qmax_); }
  Floats Decode(Ints codes) const { return ToFloats(Sub(codes, zero_)); }
  static Ints LoadCodes(const uint8_t* p, bool is_signed) { return is_signed ? LoadSignedBytes(p) : LoadBytes(p); }

 private:
  Ints zero_, qmin_, qmax_;
};

class FloatCodes {
 public:
  FloatCodes(const CodeFormat& format, Ints)
      : dropped_(23 - format.mantissa_bits),
        sign_shift_(31 - format.sign_bit),
        largest_(Set(format.largest)),
        smallest_normal_(Set(Power(1 - format.bias))),
        one_(SetInt(1)),
        half_(SetInt((1 << (22 - format.mantissa_bits)) - 1)),
        rebias_(SetInt((127 - format.bias) << format.mantissa_bits)),
        sign_(SetInt(1 << format.sign_bit)),
        // Added to a subnormal it leaves its value, in steps and half to even, in the lowest bits.
        step_(Set(Power(24 - format.bias - format.mantissa_bits))),
        values_(format.values) {}
  Ints Encode(Floats steps, Floats x) const {
    const Floats size = Min(Abs(steps), largest_);
    const Ints bits = Bits(size);
    const Ints even = And(ShiftRight(bits, dropped_), one_);
    const Ints normal = Sub(ShiftRight(Add(Add(bits, even), half_), dropped_), rebias_);
    const Ints subnormal = Sub(Bits(Add(size, step_)), Bits(step_));
    const Ints code = Select(Greater(smallest_normal_, size), subnormal, normal);
    return Or(code, And(ShiftRight(Bits(x), sign_shift_), sign_));
  }
  Floats Decode(Ints codes) const { return LookUp(values_, codes); }
  static Ints LoadCodes(const uint8_t* p, bool) { return LoadBytes(p); }

 private:
  static float Power(int exponent) { return FloatOf(static_cast<uint32_t>(exponent + 127) << 23); }
  int dropped_, sign_shift_;
  Floats largest_, smallest_normal_;
  Ints one_, half_, rebias_, sign_;
  Floats step_;
  const float* values_;
};

class TableCodes {
 public:
  TableCodes(const CodeFormat& format, Ints) : format_(format) {}
  Ints Encode(Floats steps, Floats) const {
    Ints code = SetInt(0);
    for (int i = 0; i < format_.num_boundaries; ++i) {
      code = AddOneWhere(Greater(steps, Set(format_.boundaries[i])), code);
    }
    return code;
  }
  Floats Decode(Ints codes) const { return LookUp(format_.values, codes); }
  static Ints LoadCodes(const uint8_t* p, bool) { return LoadBytes(p); }

 private:
  const CodeFormat& format_;
};

}  // namespace halfbin::HALFBIN_TARGET
