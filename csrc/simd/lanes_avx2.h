// Sixteen lanes in two AVX2 registers: the arithmetic of `lanes_portable.h`, which says what each function does.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace halfbin::avx2 {

constexpr size_t kInTurns = 2;  // Floats that long chains of steps are taken with in turns: as many as registers hold

struct Floats {
  __m256 a, b;
};
struct Ints {
  __m256i a, b;
};
struct Mask {
  __m256 a, b;
};
struct Doubles {
  __m256d v[4];
};
struct Table {
  __m256 first, change;
};
struct Words {
  __m256i a, b;
};

inline __m256i FirstOfEight(size_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
}
inline size_t Behind(size_t count) { return count > 8 ? count - 8 : 0; }

inline Floats Set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Ints SetInt(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Doubles ZeroSums() { return {{_mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd()}}; }

inline Floats Load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Floats LoadFirst(const float* p, size_t count) {
  const size_t behind = Behind(count);
  return {_mm256_maskload_ps(p, FirstOfEight(count)),
          behind ? _mm256_maskload_ps(p + 8, FirstOfEight(behind)) : _mm256_setzero_ps()};
}
inline void Store(float* p, Floats x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline void StoreFirst(float* p, Floats x, size_t count) {
  _mm256_maskstore_ps(p, FirstOfEight(count), x.a);
  if (const size_t behind = Behind(count)) _mm256_maskstore_ps(p + 8, FirstOfEight(behind), x.b);
}

inline __m256 WidenBfloat16(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
inline Floats FromBfloat16(const uint16_t* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {WidenBfloat16(_mm_loadu_si128(q)), WidenBfloat16(_mm_loadu_si128(q + 1))};
}
inline Floats FromFloat16(const uint16_t* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}

inline Floats Add(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Floats Sub(Floats x, Floats y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Floats Mul(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Floats Div(Floats x, Floats y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Floats Min(Floats x, Floats y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline Floats Max(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Floats Abs(Floats x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}

constexpr bool kHasFma = true;
constexpr bool kHasNibbles = true;
inline Floats MulAdd(Floats x, Floats y, Floats z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline Floats NegMulAdd(Floats x, Floats y, Floats z) {
  return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)};
}

inline Ints Round(Floats x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline Floats ToFloats(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline Ints Bits(Floats x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
inline Floats FromBits(Ints x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }

inline Ints Add(Ints x, Ints y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline Ints Sub(Ints x, Ints y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
inline Ints And(Ints x, Ints y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
inline Ints Or(Ints x, Ints y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
inline Ints Min(Ints x, Ints y) { return {_mm256_min_epi32(x.a, y.a), _mm256_min_epi32(x.b, y.b)}; }
inline Ints Max(Ints x, Ints y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
inline Ints ShiftLeft(Ints x, int n) {
  const __m128i by = _mm_cvtsi32_si128(n);
  return {_mm256_sll_epi32(x.a, by), _mm256_sll_epi32(x.b, by)};
}
inline Ints ShiftRight(Ints x, int n) {
  const __m128i by = _mm_cvtsi32_si128(n);
  return {_mm256_srl_epi32(x.a, by), _mm256_srl_epi32(x.b, by)};
}

inline Mask Greater(Floats x, Floats y) {
  return {_mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ)};
}
inline Floats Select(Mask m, Floats x, Floats y) {
  return {_mm256_blendv_ps(y.a, x.a, m.a), _mm256_blendv_ps(y.b, x.b, m.b)};
}
inline Ints Select(Mask m, Ints x, Ints y) { return Bits(Select(m, FromBits(x), FromBits(y))); }
inline Ints AddOneWhere(Mask m, Ints x) { return Sub(x, Ints{_mm256_castps_si256(m.a), _mm256_castps_si256(m.b)}); }

inline Floats LookUp(const float* table, Ints index) {
  return {_mm256_i32gather_ps(table, index.a, 4), _mm256_i32gather_ps(table, index.b, 4)};
}

// The first eight numbers, and which bits of them differ in the other eight. A permutation takes three bits of an index; the fourth lets
// the differences through. Choosing between two permutations took 4 % longer: a blend is three instructions on a recent Xeon.
inline Table LoadTable(const float* p) {
  const __m256 first = _mm256_loadu_ps(p);
  return {first, _mm256_xor_ps(first, _mm256_loadu_ps(p + 8))};
}
inline __m256 LookUpEight(Table table, __m256i index) {
  const __m256 fourth = _mm256_castsi256_ps(_mm256_srai_epi32(_mm256_slli_epi32(index, 28), 31));
  const __m256 change = _mm256_and_ps(_mm256_permutevar8x32_ps(table.change, index), fourth);
  return _mm256_xor_ps(_mm256_permutevar8x32_ps(table.first, index), change);
}
inline Floats LookUp(Table table, Ints index) { return {LookUpEight(table, index.a), LookUpEight(table, index.b)}; }
inline Ints LoadInts(const uint8_t* p) {
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
template <int kBits>
inline Ints ShiftRight(Ints x) {
  return {_mm256_srli_epi32(x.a, kBits), _mm256_srli_epi32(x.b, kBits)};
}

inline Words LoadWords(const uint8_t* p) {
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline Words And(Words x, uint16_t mask) {
  const __m256i m = _mm256_set1_epi16(static_cast<int16_t>(mask));
  return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
}
template <int kBits>
inline Words ShiftLeft(Words x) {
  return {_mm256_slli_epi16(x.a, kBits), _mm256_slli_epi16(x.b, kBits)};
}
template <int kBits>
inline Words ShiftRightSigned(Words x) {
  return {_mm256_srai_epi16(x.a, kBits), _mm256_srai_epi16(x.b, kBits)};
}
inline Floats SixteenFromFloat16(__m256i x) {
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))};
}
inline Floats FirstFromFloat16(Words x) { return SixteenFromFloat16(x.a); }
inline Floats LastFromFloat16(Words x) { return SixteenFromFloat16(x.b); }

// Of each lane, in its lower half.
inline __m256i RoundToBfloat16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
}
inline void StoreBfloat16(uint16_t* p, Floats x) {
  // Packing works within halves of a register: quarters come out as a0 b0 | a1 b1.
  const __m256i words = _mm256_packus_epi32(RoundToBfloat16(x.a), RoundToBfloat16(x.b));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(words, 0xd8));
}

inline void StoreBytes(uint8_t* p, Ints x) {
  const __m256i low_bytes = _mm256_set1_epi32(0xff);
  // Packing works within halves of a register: quarters come out as a0 b0 | a1 b1, and are put in order at the end.
  const __m256i words = _mm256_packus_epi32(_mm256_and_si256(x.a, low_bytes), _mm256_and_si256(x.b, low_bytes));
  const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1)));
}
inline void StoreNibbles(uint8_t* p, Ints x) {
  // An odd lane is the upper half of its pair: 28 bits down it lies beside the even one.
  const __m256i a = _mm256_or_si256(x.a, _mm256_srli_epi64(x.a, 28)), b = _mm256_or_si256(x.b, _mm256_srli_epi64(x.b, 28));
  // The even lanes of both, in the order of quarters a0 b0 | a1 b1, and of each the lowest byte.
  const __m256i even = _mm256_castps_si256(_mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0x88));
  const __m256i bytes = _mm256_shuffle_epi8(_mm256_permute4x64_epi64(even, 0xd8),
                                            _mm256_set1_epi64x(static_cast<int64_t>(0x808080800c080400)));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p),
                   _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
}
inline Ints LoadBytes(const uint8_t* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8))};
}
inline Ints LoadSignedBytes(const uint8_t* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8))};
}

inline __m256d Quarter(const Floats& x, int i) {
  const __m256 half = i < 2 ? x.a : x.b;
  return _mm256_cvtps_pd(i % 2 ? _mm256_extractf128_ps(half, 1) : _mm256_castps256_ps128(half));
}
inline void AddTo(Doubles& sum, Floats x) {
  for (int i = 0; i < 4; ++i) sum.v[i] = _mm256_add_pd(sum.v[i], Quarter(x, i));
}
inline void AddProductTo(Doubles& sum, Floats x, Floats y) {
  // The product of two float32 is exact in float64, so that the fused form gives the bits of the other one.
  for (int i = 0; i < 4; ++i) sum.v[i] = _mm256_fmadd_pd(Quarter(x, i), Quarter(y, i), sum.v[i]);
}
inline double Total(const Doubles& sum) {
  alignas(32) double s[8];
  _mm256_store_pd(s, _mm256_add_pd(sum.v[0], sum.v[2]));
  _mm256_store_pd(s + 4, _mm256_add_pd(sum.v[1], sum.v[3]));
  return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

inline float Least(Floats x) {
  alignas(32) float s[8];
  _mm256_store_ps(s, _mm256_min_ps(x.a, x.b));
  float least = s[0];
  for (int i = 1; i < 8; ++i) least = s[i] < least ? s[i] : least;
  return least;
}
inline float Greatest(Floats x) {
  alignas(32) float s[8];
  _mm256_store_ps(s, _mm256_max_ps(x.a, x.b));
  float greatest = s[0];
  for (int i = 1; i < 8; ++i) greatest = s[i] > greatest ? s[i] : greatest;
  return greatest;
}
inline int32_t Greatest(Ints x) {
  alignas(32) int32_t s[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(s), _mm256_max_epi32(x.a, x.b));
  int32_t greatest = s[0];
  for (int i = 1; i < 8; ++i) greatest = s[i] > greatest ? s[i] : greatest;
  return greatest;
}

}  // namespace halfbin::avx2
