// What the files for Arm share: the rounding of inputs, and codes of 4 bits centred. Needs the dot product instructions; unnamed for the
// same reason as steps.h.
//
// gcc 12 turns most loops of steps.h into good vector instructions, but not the search for a range: it goes over pieces the wrong way
// and ends each with 32 reductions of a vector to a number.
#pragma once

#include <arm_neon.h>

#include "matmul/steps.h"

// As HALFBIN_UNROLL, for a panel's vectors.
#define HALFBIN_UNROLL_VECTORS _Pragma("GCC unroll 16")

namespace halfbin::matmul {
namespace {

constexpr size_t kLanes = 4;                       // rows of a vector
constexpr size_t kVectors = kPanelRows / kLanes;   // of a panel

// The loops of RoundTokens.
struct NeonLoops {
  static Range RangeOf(const Tensor& x, size_t at, size_t n) {
    const int32x4_t magnitude = vdupq_n_s32(0x7fffffff);
    int32x4_t low[4], high[4];
    HALFBIN_UNROLL
    for (size_t i = 0; i < 4; ++i) low[i] = high[i] = vdupq_n_s32(0);
    alignas(64) float v[64];
    for (size_t c = 0; c < n; c += 64) {
      LoadPiece(x, at + c, n - c < 64 ? n - c : 64, v);
      for (size_t j = 0; j < 64; j += 16) {
        HALFBIN_UNROLL
        for (size_t i = 0; i < 4; ++i) {
          const int32x4_t bits = vreinterpretq_s32_f32(vld1q_f32(v + j + 4 * i));
          const int32x4_t ordered = veorq_s32(bits, vandq_s32(vshrq_n_s32(bits, 31), magnitude));
          low[i] = vminq_s32(low[i], ordered);
          high[i] = vmaxq_s32(high[i], ordered);
        }
      }
    }
    const int32_t least = vminvq_s32(vminq_s32(vminq_s32(low[0], low[1]), vminq_s32(low[2], low[3])));
    const int32_t greatest = vmaxvq_s32(vmaxq_s32(vmaxq_s32(high[0], high[1]), vmaxq_s32(high[2], high[3])));
    return RangeFrom(least, greatest);
  }

  static int32_t RoundPiece(const Tensor& x, size_t at, size_t n, const InputGrid& grid, const Step& step, int8_t* out) {
    alignas(64) float v[64];
    LoadPiece(x, at, n, v);
    const float32x4_t scale = vdupq_n_f32(step.scale);
    const float32x4_t low = vdupq_n_f32(static_cast<float>(grid.qmin - step.zero_point));
    const float32x4_t high = vdupq_n_f32(static_cast<float>(grid.qmax - step.zero_point));
    const int32x4_t offset = vdupq_n_s32(step.zero_point - Shift(grid));
    for (size_t c = 0; c < 64; c += 16) {
      int32x4_t q[4];
      HALFBIN_UNROLL
      for (size_t i = 0; i < 4; ++i) {
        const float32x4_t clipped = vminq_f32(vmaxq_f32(vdivq_f32(vld1q_f32(v + c + 4 * i), scale), low), high);
        q[i] = vaddq_s32(vcvtnq_s32_f32(clipped), offset);  // to nearest, half to even
      }
      const int16x8_t first = vuzp1q_s16(vreinterpretq_s16_s32(q[0]), vreinterpretq_s16_s32(q[1]));
      const int16x8_t next = vuzp1q_s16(vreinterpretq_s16_s32(q[2]), vreinterpretq_s16_s32(q[3]));
      vst1q_s8(out + c, vuzp1q_s8(vreinterpretq_s8_s16(first), vreinterpretq_s8_s16(next)));
    }
    if (n < 64) std::memset(out + n, 0, 64 - n);
    int32x4_t sum = vdupq_n_s32(0);
    HALFBIN_UNROLL
    for (size_t c = 0; c < 64; c += 16) sum = vdotq_s32(sum, vld1q_s8(out + c), vdupq_n_s8(1));
    return vaddvq_s32(sum);
  }
};

// Each row's z in four equal bytes, as its codes lie.
inline void SpreadZeros(const uint8_t* block, const Weights& w, uint8_t (&zeros)[4 * kPanelRows]) {
  for (size_t r = 0; r < kPanelRows; ++r) {
    std::memset(zeros + 4 * r, w.header.has_zeros ? block[w.zeros_at + r] : w.header.zero, 4);
  }
}

// 16 bytes of codes of 4 bits: columns 0 to 3 of four rows, and columns 4 to 7.
struct Columns {
  uint8x16_t first, next;
};

inline Columns LoadNibbles(const uint8_t* codes) {
  const uint8x16_t both = vld1q_u8(codes);
  return {vandq_u8(both, vdupq_n_u8(0xf)), vshrq_n_u8(both, 4)};
}

// The same less z: what is left is signed.
inline Columns LoadCentred(const uint8_t* codes, const uint8_t* zeros) {
  const Columns u = LoadNibbles(codes);
  const uint8x16_t z = vld1q_u8(zeros);
  return {vsubq_u8(u.first, z), vsubq_u8(u.next, z)};
}

}  // namespace
}  // namespace halfbin::matmul
