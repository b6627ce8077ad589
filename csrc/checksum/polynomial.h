// Polynomials over two elements, of degree 31 at most, as CRC-32 counts them: the coefficient of x^i is bit 31 - i.
#pragma once

#include <cstdint>

namespace halfbin {

constexpr uint32_t TimesX(uint32_t a) { return (a >> 1) ^ ((a & 1u) != 0 ? 0xedb88320u : 0u); }  // modulo CRC-32's polynomial

constexpr uint32_t PowerOfX(int exponent) {
  uint32_t a = 0x80000000u;
  for (int i = 0; i < exponent; ++i) a = TimesX(a);
  return a;
}

}  // namespace halfbin
