// Codes of 4 bits to bytes, and the rounding of inputs, for the instruction sets that have AVX-512. Unnamed for the same reason as
// steps.h.
#pragma once

#include <immintrin.h>

#include "matmul/steps.h"

namespace halfbin::matmul {
namespace {

// `columns` of a panel, a multiple of 8: from weights.h's layout of 4 bits to that of 8, less `zeros`, four equal bytes for each row.
inline void UnpackNibbles(const uint8_t* codes, size_t columns, const __m512i (&zeros)[4], uint8_t* out) {
  const __m512i low = _mm512_set1_epi8(0xf);
  for (size_t c = 0; c < columns; c += 8, codes += 256, out += 512) {
    HALFBIN_UNROLL
    for (size_t v = 0; v < 4; ++v) {
      const __m512i both = _mm512_load_si512(codes + v * 64);
      _mm_prefetch(reinterpret_cast<const char*>(codes + 1024 + v * 64), _MM_HINT_T0);
      const __m512i first = _mm512_and_si512(both, low), next = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
      _mm512_store_si512(out + v * 64, _mm512_sub_epi8(first, zeros[v]));
      _mm512_store_si512(out + 256 + v * 64, _mm512_sub_epi8(next, zeros[v]));
    }
  }
}

// The loops of RoundTokens. As gcc 12 makes them from steps.h, 512 x 4096 inputs in groups of 128 take 2.5 ms on a 4 GHz
// Xeon; so, 0.9.
struct Avx512Loops {
  // 16 numbers from x[at] on, or those that `mask` names and zeros.
  static __m512 Load16(const Tensor& x, size_t at, __mmask16 mask) {
    if (x.type == Float::kFloat32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(x.data) + at);
    const __m256i halves = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(x.data) + at);
    if (x.type == Float::kFloat16) return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }

  static __mmask16 First(size_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : (1u << n) - 1); }

  static Range RangeOf(const Tensor& x, size_t at, size_t n) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i low[2] = {}, high[2] = {};
    for (size_t i = 0; i < n; i += 32) {
      HALFBIN_UNROLL
      for (size_t j = 0; j < 2; ++j) {
        const size_t from = i + 16 * j;
        const __m512i bits = _mm512_castps_si512(Load16(x, at + from, First(from < n ? n - from : 0)));
        const __m512i flip = _mm512_and_si512(_mm512_srai_epi32(bits, 31), magnitude);
        const __m512i ordered = _mm512_xor_si512(bits, flip);
        low[j] = _mm512_min_epi32(low[j], ordered);
        high[j] = _mm512_max_epi32(high[j], ordered);
      }
    }
    return RangeFrom(_mm512_reduce_min_epi32(_mm512_min_epi32(low[0], low[1])),
                     _mm512_reduce_max_epi32(_mm512_max_epi32(high[0], high[1])));
  }

  static int32_t RoundPiece(const Tensor& x, size_t at, size_t n, const InputGrid& grid, const Step& step, int8_t* out) {
    const __m512 scale = _mm512_set1_ps(step.scale);
    const __m512 low = _mm512_set1_ps(static_cast<float>(grid.qmin - step.zero_point));
    const __m512 high = _mm512_set1_ps(static_cast<float>(grid.qmax - step.zero_point));
    const __m512i offset = _mm512_set1_epi32(step.zero_point - Shift(grid));
    __m512i sum = _mm512_setzero_si512();
    HALFBIN_UNROLL
    for (size_t i = 0; i < 4; ++i) {
      const __mmask16 here = First(16 * i < n ? n - 16 * i : 0);
      const __m512 q = _mm512_div_ps(Load16(x, at + 16 * i, here), scale);
      const __m512 clipped = _mm512_min_ps(_mm512_max_ps(q, low), high);
      // To nearest, half to even, as the processor is set.
      const __m512i s = _mm512_maskz_add_epi32(here, _mm512_cvtps_epi32(clipped), offset);
      sum = _mm512_add_epi32(sum, s);
      _mm_store_si128(reinterpret_cast<__m128i*>(out + 16 * i), _mm512_cvtepi32_epi8(s));
    }
    return _mm512_reduce_add_epi32(sum);
  }
};

}  // namespace
}  // namespace halfbin::matmul
