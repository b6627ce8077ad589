// From the range of a tile to its scale, as stored, and its zero point: plain arithmetic, included once by each instruction set.
// HALFBIN_TARGET is the namespace of that set.
#include <cstdint>
#include <cstring>

#include "rounding/rounding.h"

namespace halfbin::HALFBIN_TARGET {

struct Params {
  float scale;      // > 0, finite
  uint32_t stored;  // the bits of what is stored, in the low bytes
  int32_t zero;
};

inline uint32_t BitsOf(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float FloatOf(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline float Clip(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

// To the nearest integer, half to even, of what is clipped to +-2^20 before.
inline float RoundNear(float x) { return (Clip(x, -0x1p20f, 0x1p20f) + 0x1.8p23f) - 0x1.8p23f; }

[[gnu::always_inline]] inline void StoreScale(float scale, ScaleType type, Params& p) {
  if (!(scale > 0)) scale = 1;
  switch (type) {
    case ScaleType::kFloat32:
      p.scale = Clip(scale, 0x1p-126f, 0x1.fffffep127f);
      p.stored = BitsOf(p.scale);
      return;
    case ScaleType::kBfloat16: {
      const uint32_t bits = BitsOf(Clip(scale, 0x1p-126f, 0x1.fep127f));
      p.stored = (bits >> 16) + ((bits & 0xffffu) != 0);
      p.scale = FloatOf(p.stored << 16);
      return;
    }
    case ScaleType::kFloat16: {
      const float s = Clip(scale, 0x1p-24f, 65504.0f);
      if (s < 0x1p-14f) {  // a subnormal float16 counts steps of 2^-24
        const float steps = s * 0x1p24f;
        p.stored = static_cast<uint32_t>(steps);
        p.stored += static_cast<float>(p.stored) < steps;
        p.scale = static_cast<float>(p.stored) * 0x1p-24f;
        return;
      }
      const uint32_t bits = BitsOf(s);
      const uint32_t up = (bits + 0x1fffu) & ~0x1fffu;
      p.stored = (up - (112u << 23)) >> 13;
      p.scale = FloatOf(up);
      return;
    }
    case ScaleType::kE8m0:
      p.stored = BitsOf(scale) >> 23;
      p.scale = p.stored == 0 ? 0x1p-127f : FloatOf(p.stored << 23);
      return;
  }
}

// `least` <= 0 <= `greatest`, both finite.
[[gnu::always_inline]] inline Params ParamsOf(float least, float greatest, const ScaleRule& rule, int32_t qmin, int32_t qmax) {
  Params p{1, 0, 0};
  switch (rule.covers) {
    case Covers::kBothAlike:
      StoreScale((-least > greatest ? -least : greatest) / rule.divisor, rule.stored, p);
      break;
    case Covers::kPositive:
      StoreScale(greatest / rule.divisor, rule.stored, p);
      break;
    case Covers::kRange: {
      // Each end divided by itself: their difference can overflow float32 where the step does not.
      StoreScale(greatest / rule.divisor - least / rule.divisor, rule.stored, p);
      const float zero = RoundNear(static_cast<float>(qmin) - least / p.scale);
      p.zero = static_cast<int32_t>(Clip(zero, static_cast<float>(qmin), static_cast<float>(qmax)));
      break;
    }
  }
  return p;
}

inline size_t ScaleBytes(ScaleType type) {
  return type == ScaleType::kFloat32 ? 4 : type == ScaleType::kE8m0 ? 1 : 2;
}

inline void Put(const Params& p, ScaleType type, void* scale, size_t index) {
  switch (type) {
    case ScaleType::kFloat32:
      static_cast<uint32_t*>(scale)[index] = p.stored;
      return;
    case ScaleType::kE8m0:
      static_cast<uint8_t*>(scale)[index] = static_cast<uint8_t>(p.stored);
      return;
    default:
      static_cast<uint16_t*>(scale)[index] = static_cast<uint16_t>(p.stored);
  }
}

}  // namespace halfbin::HALFBIN_TARGET
