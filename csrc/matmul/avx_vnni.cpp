// AVX-VNNI, vectors of 256 bits: tiles of up to 4 tokens, 8 to 12 accumulators of the 16 registers.
#include <immintrin.h>

#include "matmul/steps.h"

namespace halfbin::matmul {
namespace {

constexpr size_t kLanes = 8;     // rows of a vector
constexpr size_t kAhead = 1024;  // bytes of codes that are asked for before their turn

// The four input codes that all rows share, in every 32-bit lane.
inline __m256i Spread(const int8_t* s) {
  int32_t four;
  std::memcpy(&four, s, 4);
  return _mm256_set1_epi32(four);
}

inline __m256i* Vector(uint32_t* totals) { return reinterpret_cast<__m256i*>(totals); }

template <size_t T, size_t V>
inline void Begin(bool add, uint32_t* totals, __m256i (&acc)[T][V]) {
  HALFBIN_UNROLL
  for (size_t t = 0; t < T; ++t) {
    HALFBIN_UNROLL
    for (size_t v = 0; v < V; ++v) {
      acc[t][v] = add ? _mm256_load_si256(Vector(totals + t * kPanelRows + v * kLanes)) : _mm256_setzero_si256();
    }
  }
}

template <size_t T, size_t V>
inline void End(const __m256i (&acc)[T][V], uint32_t* totals) {
  HALFBIN_UNROLL
  for (size_t t = 0; t < T; ++t) {
    HALFBIN_UNROLL
    for (size_t v = 0; v < V; ++v) _mm256_store_si256(Vector(totals + t * kPanelRows + v * kLanes), acc[t][v]);
  }
}

template <size_t T, size_t V>
void BytesPart(const uint8_t* codes, size_t columns, const int8_t* x, bool add, uint32_t* totals) {
  __m256i acc[T][V];
  Begin<T, V>(add, totals, acc);
  for (size_t c = 0; c < columns; c += 4, codes += 256, x += 4 * T) {
    HALFBIN_UNROLL
    for (size_t v = 0; v < V; ++v) {
      const __m256i u = _mm256_load_si256(reinterpret_cast<const __m256i*>(codes + v * 32));
      _mm_prefetch(reinterpret_cast<const char*>(codes + kAhead + v * 32), _MM_HINT_T0);
      HALFBIN_UNROLL
      for (size_t t = 0; t < T; ++t) acc[t][v] = _mm256_dpbusd_avx_epi32(acc[t][v], u, Spread(x + 4 * t));
    }
  }
  End<T, V>(acc, totals);
}

template <size_t T, size_t V>
void NibblesPart(const uint8_t* codes, size_t columns, const int8_t* x, bool add, uint32_t* totals) {
  const __m256i low = _mm256_set1_epi8(0xf);
  __m256i acc[T][V];
  Begin<T, V>(add, totals, acc);
  for (size_t c = 0; c < columns; c += 8, codes += 256, x += 8 * T) {
    HALFBIN_UNROLL
    for (size_t v = 0; v < V; ++v) {
      const __m256i both = _mm256_load_si256(reinterpret_cast<const __m256i*>(codes + v * 32));
      _mm_prefetch(reinterpret_cast<const char*>(codes + kAhead + v * 32), _MM_HINT_T0);
      const __m256i u = _mm256_and_si256(both, low), next = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
      HALFBIN_UNROLL
      for (size_t t = 0; t < T; ++t) {
        acc[t][v] = _mm256_dpbusd_avx_epi32(acc[t][v], u, Spread(x + 4 * t));
        acc[t][v] = _mm256_dpbusd_avx_epi32(acc[t][v], next, Spread(x + 4 * (T + t)));
      }
    }
  }
  End<T, V>(acc, totals);
}

using DotFunction = void (*)(const uint8_t*, size_t, const int8_t*, bool, uint32_t*);

// A panel in parts of V vectors.
template <DotFunction Part, size_t V>
void WholePanel(const uint8_t* codes, size_t columns, const int8_t* x, bool add, uint32_t* totals) {
  for (size_t v = 0; v < kPanelRows / kLanes; v += V) Part(codes + v * 32, columns, x, add, totals + v * kLanes);
}

constexpr DotFunction kBytes[] = {&WholePanel<&BytesPart<1, 8>, 8>, &WholePanel<&BytesPart<2, 4>, 4>,
                                  &WholePanel<&BytesPart<3, 4>, 4>, &WholePanel<&BytesPart<4, 2>, 2>};
constexpr DotFunction kNibbles[] = {&WholePanel<&NibblesPart<1, 8>, 8>, &WholePanel<&NibblesPart<2, 4>, 4>,
                                    &WholePanel<&NibblesPart<3, 2>, 2>, &WholePanel<&NibblesPart<4, 2>, 2>};

struct Dot {
  static constexpr size_t kTilesAtOnce = 1, kPartRows = kPanelRows;
  static constexpr bool kNeverUnpacks = true, kAlwaysUnpacks = false, kCentres = false;
  DotFunction bytes, nibbles;
  explicit Dot(const Inputs& x) : bytes(kBytes[x.tile - 1]), nibbles(kNibbles[x.tile - 1]) {}

  void Bytes(const uint8_t* codes, size_t columns, const int8_t* x, size_t, bool add, uint32_t* totals) const {
    bytes(codes, columns, x, add, totals);
  }
  void Nibbles(const uint8_t* codes, size_t columns, const int8_t* x, size_t, bool add, uint32_t* totals) const {
    nibbles(codes, columns, x, add, totals);
  }
  void Centred(const uint8_t*, size_t, const int8_t*, size_t, bool, uint32_t*) const {}
  void Unpack(const uint8_t*, size_t, const uint8_t*, const Weights&, uint8_t*) const {}
};

constexpr InstructionSet kSet{"avx_vnni", 4, 4, &RoundTokens, &Multiply<Dot>};

}  // namespace

const InstructionSet* AvxVnni() { return &kSet; }

}  // namespace halfbin::matmul
