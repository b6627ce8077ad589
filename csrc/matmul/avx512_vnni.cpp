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

// Codes of `Bits` bits, 32 / Bits columns at a time: four of them for each j.
template <size_t T, unsigned Bits, bool Table>
void DotPacked(const uint8_t* codes, size_t columns, const int8_t* x, bool add, uint32_t* totals, const uint8_t* table) {
  constexpr size_t kSteps = 8 / Bits;
  const __m512i mask = _mm512_set1_epi8((1 << Bits) - 1);
  const __m512i values = Table ? _mm512_maskz_broadcast_i32x4(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(table))) : mask;
  __m512i acc[T][kVectors];
  Begin<T>(add, totals, acc);
  for (size_t c = 0; c < columns; c += 4 * kSteps, codes += 256, x += 4 * kSteps * T) {
    __m512i u[kSteps][kVectors];
    HALFBIN_UNROLL
    for (size_t v = 0; v < kVectors; ++v) {
      const __m512i all = _mm512_load_si512(codes + v * 64);
      _mm_prefetch(reinterpret_cast<const char*>(codes + kAhead + v * 64), _MM_HINT_T0);
      HALFBIN_UNROLL
      for (size_t j = 0; j < kSteps; ++j) {
        u[j][v] = _mm512_and_si512(_mm512_srli_epi16(all, static_cast<unsigned>(j * Bits)), mask);
        if constexpr (Table) u[j][v] = _mm512_shuffle_epi8(values, u[j][v]);
      }
    }
    HALFBIN_UNROLL
    for (size_t j = 0; j < kSteps; ++j) {
      HALFBIN_UNROLL
      for (size_t t = 0; t < T; ++t) {
        const __m512i s = Spread(x + 4 * (j * T + t));
        HALFBIN_UNROLL
        for (size_t v = 0; v < kVectors; ++v) DotInto(acc[t][v], u[j][v], s);
      }
    }
  }
  End<T>(acc, totals);
}

using BytesFunction = void (*)(const uint8_t*, size_t, const int8_t*, bool, uint32_t*);
using PackedFunction = void (*)(const uint8_t*, size_t, const int8_t*, bool, uint32_t*, const uint8_t*);
constexpr BytesFunction kBytes[] = {&DotBytes<1>, &DotBytes<2>, &DotBytes<3>, &DotBytes<4>, &DotBytes<5>, &DotBytes<6>};

template <unsigned Bits, bool Table>
constexpr PackedFunction kPacked[] = {&DotPacked<1, Bits, Table>, &DotPacked<2, Bits, Table>, &DotPacked<3, Bits, Table>,
                                      &DotPacked<4, Bits, Table>, &DotPacked<5, Bits, Table>, &DotPacked<6, Bits, Table>};

struct Dot {
  static constexpr size_t kTilesAtOnce = 1, kPartRows = kPanelRows;
  static constexpr bool kNeverUnpacks = false, kAlwaysUnpacks = false, kCentres = false;
  size_t tile;
  explicit Dot(const Inputs& x) : tile(x.tile) {}

  void Bytes(const uint8_t* codes, size_t columns, const int8_t* x, size_t, bool add, uint32_t* totals) const {
    kBytes[tile - 1](codes, columns, x, add, totals);
  }
  void Nibbles(const uint8_t* codes, size_t columns, const int8_t* x, size_t, bool add, uint32_t* totals) const {
    kPacked<4, false>[tile - 1](codes, columns, x, add, totals, nullptr);
  }
  void Crumbs(const uint8_t* codes, size_t columns, const int8_t* x, size_t, bool add, uint32_t* totals) const {
    kPacked<2, false>[tile - 1](codes, columns, x, add, totals, nullptr);
  }
  void LookedUp(const uint8_t* codes, size_t columns, const int8_t* x, size_t, bool add, uint32_t* totals,
                const uint8_t* table) const {
    kPacked<4, true>[tile - 1](codes, columns, x, add, totals, table);
  }
  void Centred(const uint8_t*, size_t, const int8_t*, size_t, bool, uint32_t*) const {}
  void Unpack(const uint8_t* codes, size_t columns, const uint8_t*, const Weights&, uint8_t* out) const {
    const __m512i zeros[kVectors] = {};
    UnpackNibbles(codes, columns, zeros, out);
  }
};

constexpr InstructionSet kSet{"avx512_vnni", 6, 4, &RoundTokens<Avx512Loops>, &Multiply<Dot>};

}  // namespace

const InstructionSet* Avx512Vnni() { return &kSet; }

}  // namespace halfbin::matmul
