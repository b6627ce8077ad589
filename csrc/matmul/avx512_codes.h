// Codes of 4 bits to bytes, for the instruction sets that have AVX-512. Unnamed for the same reason as steps.h.
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

}  // namespace
}  // namespace halfbin::matmul
