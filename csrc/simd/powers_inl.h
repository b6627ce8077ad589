// x^q lane by lane: included once by each instruction set, behind its lanes. HALFBIN_TARGET is the namespace. Multiplications and additions
// are fused on all of them, so that all give the same bits.
namespace halfbin::HALFBIN_TARGET {

// Of several registers in turns: each step waits for the one before, four cycles long, and meanwhile the others have theirs. A processor
// that takes instructions out of order sees too few of them ahead to do so by itself.
template <size_t kCount, size_t kDegree>
inline void Polynomials(const Floats (&x)[kCount], const float (&coefficients)[kDegree], Floats (&y)[kCount]) {
  for (Floats& each : y) each = Set(coefficients[kDegree - 1]);
#pragma GCC unroll 8
  for (size_t i = 1; i < kDegree; ++i) {
#pragma GCC unroll 4
    for (size_t j = 0; j < kCount; ++j) y[j] = MulAdd(y[j], x[j], Set(coefficients[kDegree - 1 - i]));
  }
}

// x^q for x >= 0 and -1 < q <= 0, by 2^(q log2(x)): within 2^-20 of itself for x of 2^-16 to 2^16, within 2^-16 for all; what is beyond
// 2^-126 to 2^126 counts as these.
//
// log2 is the exponent and a polynomial on mantissas from 2^-0.5 to 2^0.5, whose coefficients interpolate log2(1 + f) / f at Chebyshev's
// points: off by 6.2e-7, beside adding the exponent in float32. That of 2^r on [-0.5, 0.5] is off by 1.6e-7 of it.
template <size_t kCount>
inline void Powers(const Floats (&x)[kCount], Floats q, Floats (&power)[kCount]) {
  constexpr float kLog[] = {0x1.71549p+0f,  -0x1.71562p-1f,  0x1.ec25d8p-2f, -0x1.70272ep-2f,
                            0x1.2f39f8p-2f, -0x1.12651ep-2f, 0x1.587236p-3f};
  constexpr float kExp[] = {0x1.000002p+0f, 0x1.62e43p-1f, 0x1.ebf906p-3f, 0x1.c6af6cp-5f, 0x1.3d107p-7f, 0x1.5f089p-10f};
  const Ints root = SetInt(0x3f3504f3), exponent_bits = SetInt(static_cast<int32_t>(0xff800000));  // 2^-0.5: counted from there
  const Floats to_whole = Set(0x1.8p23f);  // added, it leaves the nearest whole number in the lowest bits
  Floats f[kCount], exponent[kCount], y[kCount];
#pragma GCC unroll 4
  for (size_t j = 0; j < kCount; ++j) {
    const Ints bits = Bits(Min(Max(x[j], Set(0x1p-126f)), Set(0x1p126f)));
    const Ints times_2_23 = And(Sub(bits, root), exponent_bits);
    f[j] = Sub(FromBits(Sub(bits, times_2_23)), Set(1.0f));
    exponent[j] = Mul(ToFloats(times_2_23), Set(0x1p-23f));
  }
  Polynomials(f, kLog, y);
  Floats whole[kCount], rest[kCount];
#pragma GCC unroll 4
  for (size_t j = 0; j < kCount; ++j) {
    const Floats log = MulAdd(f[j], y[j], exponent[j]);
    whole[j] = MulAdd(q, log, to_whole);
    rest[j] = MulAdd(q, log, Sub(to_whole, whole[j]));
  }
  Polynomials(rest, kExp, y);
#pragma GCC unroll 4
  for (size_t j = 0; j < kCount; ++j) power[j] = FromBits(Add(Bits(y[j]), ShiftLeft(Bits(whole[j]), 23)));
}

}  // namespace halfbin::HALFBIN_TARGET
