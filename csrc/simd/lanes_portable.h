// Sixteen lanes of float32 or int32, as arrays: what any compiler turns into the registers it may use.
//
// Every instruction set works on sixteen lanes, whatever its registers hold, and no function contracts or reorders arithmetic:
// so a loop over lanes gives the same bits on all of them. Pointers need no alignment. `First` functions touch `count` < 16
// elements only; other lanes are read as 0.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace halfbin::portable {

constexpr int kLanes = 16;

constexpr size_t kInTurns = 1;  // Floats that long chains of steps are taken with in turns: as many as registers hold

struct Floats {
  float v[kLanes];
};
struct Ints {
  int32_t v[kLanes];
};
struct Mask {
  int32_t v[kLanes];  // 0 or -1
};
struct Doubles {
  double v[kLanes];
};
struct Table {
  float v[kLanes];
};
struct Words {
  uint16_t v[2 * kLanes];
};

template <class To, class From>
inline To CopyBits(From x) {
  To to;
  static_assert(sizeof(To) == sizeof(From));
  std::memcpy(&to, &x, sizeof(To));
  return to;
}

template <class Result, class Function>
inline Result ForEachLane(Function f) {
  Result r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = f(i);
  return r;
}

inline Floats Set(float x) {
  return ForEachLane<Floats>([x](int) { return x; });
}
inline Ints SetInt(int32_t x) {
  return ForEachLane<Ints>([x](int) { return x; });
}
inline Doubles ZeroSums() {
  return ForEachLane<Doubles>([](int) { return 0.0; });
}

inline Floats Load(const float* p) {
  Floats r;
  std::memcpy(r.v, p, sizeof(r.v));
  return r;
}
inline Floats LoadFirst(const float* p, size_t count) {
  Floats r{};
  std::memcpy(r.v, p, count * sizeof(float));
  return r;
}
inline void Store(float* p, const Floats& x) { std::memcpy(p, x.v, sizeof(x.v)); }
inline void StoreFirst(float* p, const Floats& x, size_t count) { std::memcpy(p, x.v, count * sizeof(float)); }

inline Floats FromBfloat16(const uint16_t* p) {
  return ForEachLane<Floats>([p](int i) { return CopyBits<float>(static_cast<uint32_t>(p[i]) << 16); });
}
// The exponent and mantissa of a float16, moved to where a float32 has them, are its value times 2^-112, subnormals too.
inline float WidenFloat16(uint16_t x) {
  const uint32_t size = x & 0x7fffu, sign = static_cast<uint32_t>(x & 0x8000u) << 16;
  const float wide = CopyBits<float>(size << 13) * CopyBits<float>(0x77800000u);
  const uint32_t bits = size >= 0x7c00u ? size << 13 | 0x7f800000u : CopyBits<uint32_t>(wide);  // infinity and NaN
  return CopyBits<float>(bits | sign);
}
inline Floats FromFloat16(const uint16_t* p) {
  return ForEachLane<Floats>([p](int i) { return WidenFloat16(p[i]); });
}

inline Floats Add(const Floats& a, const Floats& b) {
  return ForEachLane<Floats>([&](int i) { return a.v[i] + b.v[i]; });
}
inline Floats Sub(const Floats& a, const Floats& b) {
  return ForEachLane<Floats>([&](int i) { return a.v[i] - b.v[i]; });
}
inline Floats Mul(const Floats& a, const Floats& b) {
  return ForEachLane<Floats>([&](int i) { return a.v[i] * b.v[i]; });
}
inline Floats Div(const Floats& a, const Floats& b) {
  return ForEachLane<Floats>([&](int i) { return a.v[i] / b.v[i]; });
}
// Of a NaN and a number, both give what stands second.
inline Floats Min(const Floats& a, const Floats& b) {
  return ForEachLane<Floats>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Floats Max(const Floats& a, const Floats& b) {
  return ForEachLane<Floats>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Floats Abs(const Floats& a) {
  return ForEachLane<Floats>([&](int i) { return CopyBits<float>(CopyBits<uint32_t>(a.v[i]) & 0x7fffffffu); });
}

// Fused: rounded once. Only where kHasFma is that fast. NegMulAdd is -a * b + c.
#if defined(__FP_FAST_FMAF)
constexpr bool kHasFma = true;
#else
constexpr bool kHasFma = false;
#endif
inline Floats MulAdd(const Floats& a, const Floats& b, const Floats& c) {
  return ForEachLane<Floats>([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
}
inline Floats NegMulAdd(const Floats& a, const Floats& b, const Floats& c) {
  return ForEachLane<Floats>([&](int i) { return std::fma(-a.v[i], b.v[i], c.v[i]); });
}

// To the nearest integer, half to even; |a| <= 2^22.
inline Ints Round(const Floats& a) {
  return ForEachLane<Ints>([&](int i) { return CopyBits<int32_t>(a.v[i] + 0x1.8p23f) - 0x4b400000; });
}
inline Floats ToFloats(const Ints& a) {
  return ForEachLane<Floats>([&](int i) { return static_cast<float>(a.v[i]); });
}
inline Ints Bits(const Floats& a) { return CopyBits<Ints>(a); }
inline Floats FromBits(const Ints& a) { return CopyBits<Floats>(a); }

inline Ints Add(const Ints& a, const Ints& b) {
  return ForEachLane<Ints>([&](int i) { return a.v[i] + b.v[i]; });
}
inline Ints Sub(const Ints& a, const Ints& b) {
  return ForEachLane<Ints>([&](int i) { return a.v[i] - b.v[i]; });
}
inline Ints And(const Ints& a, const Ints& b) {
  return ForEachLane<Ints>([&](int i) { return a.v[i] & b.v[i]; });
}
inline Ints Or(const Ints& a, const Ints& b) {
  return ForEachLane<Ints>([&](int i) { return a.v[i] | b.v[i]; });
}
inline Ints Min(const Ints& a, const Ints& b) {
  return ForEachLane<Ints>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Ints Max(const Ints& a, const Ints& b) {
  return ForEachLane<Ints>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
// Bits move, signs do not.
inline Ints ShiftLeft(const Ints& a, int n) {
  return ForEachLane<Ints>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << n); });
}
inline Ints ShiftRight(const Ints& a, int n) {
  return ForEachLane<Ints>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) >> n); });
}

inline Mask Greater(const Floats& a, const Floats& b) {
  return ForEachLane<Mask>([&](int i) { return a.v[i] > b.v[i] ? -1 : 0; });
}
inline Floats Select(const Mask& m, const Floats& a, const Floats& b) {
  return ForEachLane<Floats>([&](int i) { return m.v[i] ? a.v[i] : b.v[i]; });
}
inline Ints Select(const Mask& m, const Ints& a, const Ints& b) {
  return ForEachLane<Ints>([&](int i) { return m.v[i] ? a.v[i] : b.v[i]; });
}
inline Ints AddOneWhere(const Mask& m, const Ints& a) {
  return ForEachLane<Ints>([&](int i) { return a.v[i] - m.v[i]; });
}

inline Floats LookUp(const float* table, const Ints& index) {
  return ForEachLane<Floats>([&](int i) { return table[index.v[i]]; });
}

// A table of sixteen numbers that may lie in registers; of an index, the low four bits count.
inline Table LoadTable(const float* p) {
  Table r;
  std::memcpy(r.v, p, sizeof(r.v));
  return r;
}
inline Floats LookUp(const Table& table, const Ints& index) {
  return ForEachLane<Floats>([&](int i) { return table.v[index.v[i] & 15]; });
}
inline Ints LoadInts(const uint8_t* p) {
  Ints r;
  std::memcpy(r.v, p, sizeof(r.v));
  return r;
}
template <int kBits>
inline Ints ShiftRight(const Ints& a) {
  return ShiftRight(a, kBits);
}

// Twice sixteen words of 16 bits, and what they are as float16: those of the first sixteen, and of the others.
inline Words LoadWords(const uint8_t* p) {
  Words r;
  std::memcpy(r.v, p, sizeof(r.v));
  return r;
}
inline Words And(const Words& a, uint16_t mask) {
  Words r;
  for (int i = 0; i < 2 * kLanes; ++i) r.v[i] = a.v[i] & mask;
  return r;
}
template <int kBits>
inline Words ShiftLeft(const Words& a) {
  Words r;
  for (int i = 0; i < 2 * kLanes; ++i) r.v[i] = static_cast<uint16_t>(a.v[i] << kBits);
  return r;
}
template <int kBits>  // the sign moves in
inline Words ShiftRightSigned(const Words& a) {
  Words r;
  for (int i = 0; i < 2 * kLanes; ++i) r.v[i] = static_cast<uint16_t>(static_cast<int16_t>(a.v[i]) >> kBits);
  return r;
}
inline Floats FirstFromFloat16(const Words& a) { return FromFloat16(a.v); }
inline Floats LastFromFloat16(const Words& a) { return FromFloat16(a.v + kLanes); }

// To nearest, half to even; NaN becomes the quiet one.
inline void StoreBfloat16(uint16_t* p, const Floats& x) {
  const Ints bits = Bits(x);
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t b = static_cast<uint32_t>(bits.v[i]), rounded = (b + 0x7fffu + (b >> 16 & 1u)) >> 16;
    p[i] = static_cast<uint16_t>((b & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
}

// The lowest byte of each lane.
inline void StoreBytes(uint8_t* p, const Ints& a) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint8_t>(a.v[i]);
}
// Two lanes to a byte, the even one in the low nibble; each lane is 0 to 15. Here bytes are packed twice as fast: 3.6 GB/s of float32
// to int4, 1.9 from lanes of 32 bits.
constexpr bool kHasNibbles = false;
inline void StoreNibbles(uint8_t* p, const Ints& a) {
  for (int i = 0; i < kLanes; i += 2) p[i / 2] = static_cast<uint8_t>(a.v[i] | a.v[i + 1] << 4);
}
inline Ints LoadBytes(const uint8_t* p) {
  return ForEachLane<Ints>([p](int i) { return static_cast<int32_t>(p[i]); });
}
inline Ints LoadSignedBytes(const uint8_t* p) {
  return ForEachLane<Ints>([p](int i) { return static_cast<int32_t>(static_cast<int8_t>(p[i])); });
}

inline void AddTo(Doubles& sum, const Floats& x) {
  for (int i = 0; i < kLanes; ++i) sum.v[i] += static_cast<double>(x.v[i]);
}
inline void AddProductTo(Doubles& sum, const Floats& x, const Floats& y) {
  for (int i = 0; i < kLanes; ++i) sum.v[i] += static_cast<double>(x.v[i]) * static_cast<double>(y.v[i]);
}
// In one order on every instruction set.
inline double Total(const Doubles& sum) {
  double s[8];
  for (int i = 0; i < 8; ++i) s[i] = sum.v[i] + sum.v[i + 8];
  return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

inline float Least(const Floats& a) {
  float least = a.v[0];
  for (int i = 1; i < kLanes; ++i) least = a.v[i] < least ? a.v[i] : least;
  return least;
}
inline float Greatest(const Floats& a) {
  float greatest = a.v[0];
  for (int i = 1; i < kLanes; ++i) greatest = a.v[i] > greatest ? a.v[i] : greatest;
  return greatest;
}
inline int32_t Greatest(const Ints& a) {
  int32_t greatest = a.v[0];
  for (int i = 1; i < kLanes; ++i) greatest = a.v[i] > greatest ? a.v[i] : greatest;
  return greatest;
}

}  // namespace halfbin::portable
