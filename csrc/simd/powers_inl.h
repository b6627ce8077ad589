// x^p for sixteen positive numbers: included once by each instruction set, behind its lanes. HALFBIN_TARGET is the namespace.
// Multiplications and additions are fused on all of them, so that all give the same bits.
namespace halfbin::HALFBIN_TARGET {

inline Floats Polynomial(Floats x, const float* coefficients, int degree) {
  Floats y = Set(coefficients[degree]);
  for (int i = degree - 1; i >= 0; --i) y = MulAdd(y, x, Set(coefficients[i]));
  return y;
}

// log2 of normal positive numbers: the exponent, and a polynomial on mantissas from 2^-0.5 to 2^0.5. The coefficients interpolate
// log2(1 + f) / f at Chebyshev's points; the largest error is 3e-8 of it, beside that of adding the exponent in float32.
inline Floats Log2(Floats x) {
  constexpr float kLog[] = {0x1.715476p+0f,  -0x1.71547p-1f,  0x1.ec73d4p-2f,  -0x1.715c9cp-2f, 0x1.26d41p-2f,
                            -0x1.e94f12p-3f, 0x1.b9b11ep-3f, -0x1.a8cc5cp-3f, 0x1.025a2p-3f};
  const Ints root = SetInt(0x3f3504f3);  // 2^-0.5: the exponent is counted from there
  const Ints from_root = Sub(Bits(x), root);
  const Ints exponent = Sub(ShiftRight(Add(from_root, SetInt(127 << 23)), 23), SetInt(127));
  const Floats mantissa = FromBits(Sub(Bits(x), ShiftLeft(exponent, 23)));
  const Floats f = Sub(mantissa, Set(1.0f));
  return MulAdd(f, Polynomial(f, kLog, 8), ToFloats(exponent));
}

// 2^x, 0 below -126; x <= 127. Of 2^r on [-0.5, 0.5], the polynomial is off by 3e-9.
inline Floats Exp2(Floats x) {
  constexpr float kExp[] = {1.0f, 0.69314718246f, 0.24022650719f, 0.05550327152f, 0.00961802527f, 0.00134004327f, 0.00015469732f};
  const Floats clipped = Max(x, Set(-126.0f));
  const Ints whole = Round(clipped);
  const Floats power = FromBits(Add(Bits(Polynomial(Sub(clipped, ToFloats(whole)), kExp, 6)), ShiftLeft(whole, 23)));
  return Select(Greater(Set(-126.0f), x), Set(0.0f), power);
}

// x^p for x >= 0 and 0 < p <= 1; what is below the smallest normal number counts as 0.
inline Floats Power(Floats x, Floats p) {
  const Floats smallest = Set(0x1p-126f);
  const Floats power = Exp2(Mul(p, Log2(Max(x, smallest))));
  return Select(Greater(smallest, x), Set(0.0f), power);
}

}  // namespace halfbin::HALFBIN_TARGET
