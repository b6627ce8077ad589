// Sixteen lanes in one AVX-512 register: the arithmetic of `lanes_portable.h`, which says what each function does.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace halfbin::avx512 {

constexpr size_t kInTurns = 4;  // Floats that long chains of steps are taken with in turns: as many as registers hold

struct Floats {
  __m512 v;
};
struct Ints {
  __m512i v;
};
struct Mask {
  __mmask16 m;
};
struct Doubles {
  __m512d low, high;
};
struct Table {
  __m512 v;
};
struct Words {
  __m512i v;
};

inline __mmask16 First(size_t count) { return static_cast<__mmask16>((1u << count) - 1u); }

inline Floats Set(float x) { return {_mm512_set1_ps(x)}; }
inline Ints SetInt(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Doubles ZeroSums() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }

inline Floats Load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Floats LoadFirst(const float* p, size_t count) { return {_mm512_maskz_loadu_ps(First(count), p)}; }
inline void Store(float* p, Floats x) { _mm512_storeu_ps(p, x.v); }
inline void StoreFirst(float* p, Floats x, size_t count) { _mm512_mask_storeu_ps(p, First(count), x.v); }

inline Floats FromBfloat16(const uint16_t* p) {
  return {_mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16))};
}
inline Floats FromFloat16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}

inline Floats Add(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats Sub(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats Mul(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats Div(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats Min(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Floats Max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Floats Abs(Floats a) { return {_mm512_abs_ps(a.v)}; }

constexpr bool kHasFma = true;
constexpr bool kHasNibbles = true;
inline Floats MulAdd(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats NegMulAdd(Floats a, Floats b, Floats c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }

inline Ints Round(Floats a) { return {_mm512_cvtps_epi32(a.v)}; }
inline Floats ToFloats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline Ints Bits(Floats a) { return {_mm512_castps_si512(a.v)}; }
inline Floats FromBits(Ints a) { return {_mm512_castsi512_ps(a.v)}; }

inline Ints Add(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Ints Sub(Ints a, Ints b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline Ints And(Ints a, Ints b) { return {_mm512_and_si512(a.v, b.v)}; }
inline Ints Or(Ints a, Ints b) { return {_mm512_or_si512(a.v, b.v)}; }
inline Ints Min(Ints a, Ints b) { return {_mm512_min_epi32(a.v, b.v)}; }
inline Ints Max(Ints a, Ints b) { return {_mm512_max_epi32(a.v, b.v)}; }
inline Ints ShiftLeft(Ints a, int n) { return {_mm512_sll_epi32(a.v, _mm_cvtsi32_si128(n))}; }
inline Ints ShiftRight(Ints a, int n) { return {_mm512_srl_epi32(a.v, _mm_cvtsi32_si128(n))}; }

inline Mask Greater(Floats a, Floats b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
inline Floats Select(Mask m, Floats a, Floats b) { return {_mm512_mask_blend_ps(m.m, b.v, a.v)}; }
inline Ints Select(Mask m, Ints a, Ints b) { return {_mm512_mask_blend_epi32(m.m, b.v, a.v)}; }
inline Ints AddOneWhere(Mask m, Ints a) { return {_mm512_mask_add_epi32(a.v, m.m, a.v, _mm512_set1_epi32(1))}; }

inline Floats LookUp(const float* table, Ints index) { return {_mm512_i32gather_ps(index.v, table, 4)}; }

inline Table LoadTable(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Floats LookUp(Table table, Ints index) { return {_mm512_permutexvar_ps(index.v, table.v)}; }
inline Ints LoadInts(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
template <int kBits>
inline Ints ShiftRight(Ints a) {
  return {_mm512_srli_epi32(a.v, kBits)};
}

inline Words LoadWords(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline Words And(Words a, uint16_t mask) { return {_mm512_and_si512(a.v, _mm512_set1_epi16(static_cast<int16_t>(mask)))}; }
template <int kBits>
inline Words ShiftLeft(Words a) {
  return {_mm512_slli_epi16(a.v, kBits)};
}
template <int kBits>
inline Words ShiftRightSigned(Words a) {
  return {_mm512_srai_epi16(a.v, kBits)};
}
inline Floats FirstFromFloat16(Words a) { return {_mm512_cvtph_ps(_mm512_castsi512_si256(a.v))}; }
inline Floats LastFromFloat16(Words a) { return {_mm512_cvtph_ps(_mm512_extracti64x4_epi64(a.v, 1))}; }

inline void StoreBfloat16(uint16_t* p, Floats x) {
  const __m512i bits = _mm512_castps_si512(x.v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7fc00000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(quiet, 16)));
}

inline void StoreBytes(uint8_t* p, Ints a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
inline void StoreNibbles(uint8_t* p, Ints a) {
  // An odd lane is the upper half of its pair: 28 bits down it lies beside the even one.
  const __m512i pairs = _mm512_or_si512(a.v, _mm512_srli_epi64(a.v, 28));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm512_cvtepi64_epi8(pairs));
}
inline Ints LoadBytes(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline Ints LoadSignedBytes(const uint8_t* p) {
  return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}

inline void AddTo(Doubles& sum, Floats x) {
  sum.low = _mm512_add_pd(sum.low, _mm512_cvtps_pd(_mm512_castps512_ps256(x.v)));
  sum.high = _mm512_add_pd(sum.high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1)));
}
inline void AddProductTo(Doubles& sum, Floats x, Floats y) {
  const __m512d x0 = _mm512_cvtps_pd(_mm512_castps512_ps256(x.v)), x1 = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1));
  const __m512d y0 = _mm512_cvtps_pd(_mm512_castps512_ps256(y.v)), y1 = _mm512_cvtps_pd(_mm512_extractf32x8_ps(y.v, 1));
  // The product of two float32 is exact in float64, so that the fused form gives the bits of the other one.
  sum.low = _mm512_fmadd_pd(x0, y0, sum.low);
  sum.high = _mm512_fmadd_pd(x1, y1, sum.high);
}
inline double Total(const Doubles& sum) {
  alignas(64) double s[8];
  _mm512_store_pd(s, _mm512_add_pd(sum.low, sum.high));
  return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

inline float Least(Floats a) { return _mm512_reduce_min_ps(a.v); }
inline float Greatest(Floats a) { return _mm512_reduce_max_ps(a.v); }
inline int32_t Greatest(Ints a) { return _mm512_reduce_max_epi32(a.v); }

}  // namespace halfbin::avx512
