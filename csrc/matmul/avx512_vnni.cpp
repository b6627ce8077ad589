// AVX-512 VNNI: tiles of up to 6 tokens x 64 rows, 24 accumulators of 16 lanes each.
#include <immintrin.h>

#include "matmul/avx512_codes.h"

namespace halfbin::matmul {
namespace {

// acc += four products per lane of unsigned u and the signed s in one 32-bit word that all lanes share. Inline, as gcc 12 spills
// accumulators of the intrinsic's form: 0.43 against 0.74 TOPS on a Zen 5 core at 6 x 64.
inline void DotInto(__m512i& acc, __m512i u, const int8_t* s) {
  __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(u), "m"(*reinterpret_cast<const int32_t*>(s)));
}

constexpr size_t kVectors = 4;  // of 16 rows in a panel
constexpr size_t kAhead = 1024;  // bytes of codes that are asked for before their turn

template <size_t T>
inline void Begin(bool add, const uint32_t* totals, __m512i (&acc)[T][kVectors]) {
  for (size_t t = 0; t < T; ++t) {
    for (size_t v = 0; v < kVectors; ++v) {
      acc[t][v] = add ? _mm512_load_si512(totals + t * kPanelRows + v * 16) : _mm512_setzero_si512();
    }
  }
}

template <size_t T>
inline void End(const __m512i (&acc)[T][kVectors], uint32_t* totals) {
  for (size_t t = 0; t < T; ++t) {
    for (size_t v = 0; v < kVectors; ++v) _mm512_store_si512(totals + t * kPanelRows + v * 16, acc[t][v]);
  }
}

template <size_t T>
void DotBytes(const uint8_t* codes, size_t columns, const int8_t* x, bool add, uint32_t* totals) {
  __m512i acc[T][kVectors];
  Begin<T>(add, totals, acc);
  for (size_t c = 0; c < columns; c += 4, codes += 256, x += 4 * T) {
    __m512i u[kVectors];
    for (size_t v = 0; v < kVectors; ++v) {
      u[v] = _mm512_load_si512(codes + v * 64);
      _mm_prefetch(reinterpret_cast<const char*>(codes + kAhead + v * 64), _MM_HINT_T0);
    }
    for (size_t t = 0; t < T; ++t) {
      for (size_t v = 0; v < kVectors; ++v) DotInto(acc[t][v], u[v], x + 4 * t);
    }
  }
  End<T>(acc, totals);
}

template <size_t T>
void DotNibbles(const uint8_t* codes, size_t columns, const int8_t* x, bool add, uint32_t* totals) {
  const __m512i low = _mm512_set1_epi8(0xf);
  __m512i acc[T][kVectors];
  Begin<T>(add, totals, acc);
  for (size_t c = 0; c < columns; c += 8, codes += 256, x += 8 * T) {
    for (size_t v = 0; v < kVectors; ++v) {
      const __m512i both = _mm512_load_si512(codes + v * 64);
      _mm_prefetch(reinterpret_cast<const char*>(codes + kAhead + v * 64), _MM_HINT_T0);
      const __m512i u = _mm512_and_si512(both, low);
      for (size_t t = 0; t < T; ++t) DotInto(acc[t][v], u, x + 4 * t);
      const __m512i next = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
      for (size_t t = 0; t < T; ++t) DotInto(acc[t][v], next, x + 4 * (T + t));
    }
  }
  End<T>(acc, totals);
}

using DotFunction = void (*)(const uint8_t*, size_t, const int8_t*, bool, uint32_t*);
constexpr DotFunction kBytes[] = {&DotBytes<1>, &DotBytes<2>, &DotBytes<3>, &DotBytes<4>, &DotBytes<5>, &DotBytes<6>};
constexpr DotFunction kNibbles[] = {&DotNibbles<1>, &DotNibbles<2>, &DotNibbles<3>,
                                    &DotNibbles<4>, &DotNibbles<5>, &DotNibbles<6>};

struct Dot {
  static constexpr size_t kTilesAtOnce = 1;
  static constexpr bool kNeverUnpacks = false, kAlwaysUnpacks = false;
  DotFunction bytes, nibbles;
  explicit Dot(const Inputs& x) : bytes(kBytes[x.tile - 1]), nibbles(kNibbles[x.tile - 1]) {}

  void Bytes(const uint8_t* codes, size_t columns, const int8_t* x, size_t, bool add, uint32_t* totals) const {
    bytes(codes, columns, x, add, totals);
  }
  void Nibbles(const uint8_t* codes, size_t columns, const int8_t* x, size_t, bool add, uint32_t* totals) const {
    nibbles(codes, columns, x, add, totals);
  }
  void Unpack(const uint8_t* codes, size_t columns, uint8_t* out) const { UnpackNibbles(codes, columns, out); }
};

constexpr InstructionSet kSet{"avx512_vnni", 6, 4, &RoundTokens, &Multiply<Dot>};

}  // namespace

const InstructionSet* Avx512Vnni() { return &kSet; }

}  // namespace halfbin::matmul
