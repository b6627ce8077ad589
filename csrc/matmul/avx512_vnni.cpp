// AVX-512 VNNI: tiles of up to 6 tokens x 64 rows, 24 accumulators of 16 lanes each.
#include <immintrin.h>

#include "matmul/avx512_codes.h"

namespace halfbin::matmul {
namespace {

// acc += four products per lane of unsigned u and signed s. Inline, as gcc 12 spills accumulators of the intrinsic's form: 0.43
// against 0.74 TOPS on a Zen 5 core at 6 x 64.
inline void DotInto(__m512i& acc, __m512i u, __m512i s) { __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u), "v"(s)); }

// The four input codes that all rows share, in every lane. Once for four vectors of rows: as an operand in memory of each product
// they were what the load ports waited for.
inline __m512i Spread(const int8_t* s) {
  int32_t four;
  std::memcpy(&four, s, 4);
  return _mm512_set1_epi32(four);
}

constexpr size_t kVectors = 4;  // of 16 rows in a panel
constexpr size_t kAhead = 1024;  // bytes of codes that are asked for before their turn

template <size_t T>
inline void Begin(bool add, const uint32_t* totals, __m512i (&acc)[T][kVectors]) {
  HALFBIN_UNROLL
  for (size_t t = 0; t < T; ++t) {
    HALFBIN_UNROLL
    for (size_t v = 0; v < kVectors; ++v) {
      acc[t][v] = add ? _mm512_load_si512(totals + t * kPanelRows + v * 16) : _mm512_setzero_si512();
    }
  }
}

template <size_t T>
inline void End(const __m512i (&acc)[T][kVectors], uint32_t* totals) {
  HALFBIN_UNROLL
  for (size_t t = 0; t < T; ++t) {
    HALFBIN_UNROLL
    for (size_t v = 0; v < kVectors; ++v) _mm512_store_si512(totals + t * kPanelRows + v * 16, acc[t][v]);
  }
}

template <size_t T>
void DotBytes(const uint8_t* codes, size_t columns, const int8_t* x, bool add, uint32_t* totals) {
  __m512i acc[T][kVectors];
  Begin<T>(add, totals, acc);
  for (size_t c = 0; c < columns; c += 4, codes += 256, x += 4 * T) {
    __m512i u[kVectors];
    HALFBIN_UNROLL
    for (size_t v = 0; v < kVectors; ++v) {
      u[v] = _mm512_load_si512(codes + v * 64);
      _mm_prefetch(reinterpret_cast<const char*>(codes + kAhead + v * 64), _MM_HINT_T0);
    }
    HALFBIN_UNROLL
    for (size_t t = 0; t < T; ++t) {
      const __m512i s = Spread(x + 4 * t);
      HALFBIN_UNROLL
      for (size_t v = 0; v < kVectors; ++v) DotInto(acc[t][v], u[v], s);
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
    __m512i u[kVectors], next[kVectors];
    HALFBIN_UNROLL
    for (size_t v = 0; v < kVectors; ++v) {
      const __m512i both = _mm512_load_si512(codes + v * 64);
      _mm_prefetch(reinterpret_cast<const char*>(codes + kAhead + v * 64), _MM_HINT_T0);
      u[v] = _mm512_and_si512(both, low);
      next[v] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
    }
    HALFBIN_UNROLL
    for (size_t t = 0; t < T; ++t) {
      const __m512i s = Spread(x + 4 * t);
      HALFBIN_UNROLL
      for (size_t v = 0; v < kVectors; ++v) DotInto(acc[t][v], u[v], s);
    }
    HALFBIN_UNROLL
    for (size_t t = 0; t < T; ++t) {
      const __m512i s = Spread(x + 4 * (T + t));
      HALFBIN_UNROLL
      for (size_t v = 0; v < kVectors; ++v) DotInto(acc[t][v], next[v], s);
    }
  }
  End<T>(acc, totals);
}

using DotFunction = void (*)(const uint8_t*, size_t, const int8_t*, bool, uint32_t*);
constexpr DotFunction kBytes[] = {&DotBytes<1>, &DotBytes<2>, &DotBytes<3>, &DotBytes<4>, &DotBytes<5>, &DotBytes<6>};
constexpr DotFunction kNibbles[] = {&DotNibbles<1>, &DotNibbles<2>, &DotNibbles<3>,
                                    &DotNibbles<4>, &DotNibbles<5>, &DotNibbles<6>};

struct Dot {
  static constexpr size_t kTilesAtOnce = 1, kPartRows = kPanelRows;
  static constexpr bool kNeverUnpacks = false, kAlwaysUnpacks = false, kCentres = false;
  DotFunction bytes, nibbles;
  explicit Dot(const Inputs& x) : bytes(kBytes[x.tile - 1]), nibbles(kNibbles[x.tile - 1]) {}

  void Bytes(const uint8_t* codes, size_t columns, const int8_t* x, size_t, bool add, uint32_t* totals) const {
    bytes(codes, columns, x, add, totals);
  }
  void Nibbles(const uint8_t* codes, size_t columns, const int8_t* x, size_t, bool add, uint32_t* totals) const {
    nibbles(codes, columns, x, add, totals);
  }
  void Centred(const uint8_t*, size_t, const int8_t*, size_t, bool, uint32_t*) const {}
  void Unpack(const uint8_t* codes, size_t columns, const uint8_t*, const Weights&, uint8_t* out) const {
    const __m512i zeros[kVectors] = {};
    UnpackNibbles(codes, columns, zeros, out);
  }
};

constexpr InstructionSet kSet{"avx512_vnni", 6, 4, &RoundTokens, &Multiply<Dot>};

}  // namespace

const InstructionSet* Avx512Vnni() { return &kSet; }

}  // namespace halfbin::matmul
