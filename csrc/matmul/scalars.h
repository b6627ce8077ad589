// Single numbers of the types that weights, inputs and outputs have. Unnamed for the same reason as steps.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "matmul/product.h"

namespace halfbin::matmul {
namespace {

inline uint32_t BitsOf(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float FromBits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// float16 to float32, exact for finite numbers: the exponent is moved by a product, which makes normal numbers of subnormal ones.
inline float FromHalf(uint16_t half) {
  const float magnitude = FromBits((half & 0x7fffu) << 13) * 0x1p112f;
  return FromBits(BitsOf(magnitude) | (half & 0x8000u) << 16);
}

inline float FromBfloat16(uint16_t bits) { return FromBits(static_cast<uint32_t>(bits) << 16); }

// To nearest, half to even; NaN stays NaN.
inline uint16_t ToBfloat16(float x) {
  const uint32_t bits = BitsOf(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// n <= 64 numbers from x[at] on.
inline void Load(const Tensor& x, size_t at, size_t n, float* out) {
  const uint16_t* from = static_cast<const uint16_t*>(x.data) + at;
  if (x.type == Float::kFloat32) {
    std::memcpy(out, static_cast<const float*>(x.data) + at, n * 4);
  } else if (x.type == Float::kBfloat16) {
    for (size_t i = 0; i < n; ++i) out[i] = FromBfloat16(from[i]);
  } else {
    for (size_t i = 0; i < n; ++i) out[i] = FromHalf(from[i]);
  }
}

}  // namespace
}  // namespace halfbin::matmul
