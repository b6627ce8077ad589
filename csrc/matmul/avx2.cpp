// AVX2: tiles of up to 4 tokens. It has no product of bytes that sums into 32 bits; `vpmaddubsw` sums pairs into 16, saturating.
//
// 4 bits: u is at most 15, so a pair of products is at most 2 * 15 * 128 = 3840 and eight of them, 32 columns, 30720: they are added up
// in 16 bits before they are widened.
// 8 bits: a pair can reach 2 * 255 * 128, which saturates. So codes of even and of odd columns are taken as 16 bits each, and
// `vpmaddwd` sums pairs of those into 32 bits, exactly.
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

// V vectors of rows, T tokens: registers for V * T sums and what they need.
template <size_t T, size_t V>
void BytesPart(const uint8_t* codes, size_t columns, const int8_t* x, bool add, uint32_t* totals) {
  const __m256i even_bytes = _mm256_set1_epi16(0xff);
  __m256i acc[T][V];
  HALFBIN_UNROLL
  for (size_t t = 0; t < T; ++t) {
    HALFBIN_UNROLL
    for (size_t v = 0; v < V; ++v) {
      acc[t][v] = add ? _mm256_load_si256(Vector(totals + t * kPanelRows + v * kLanes)) : _mm256_setzero_si256();
    }
  }
  for (size_t c = 0; c < columns; c += 4, codes += 256, x += 4 * T) {
    __m256i even[T], odd[T];
    HALFBIN_UNROLL
    for (size_t t = 0; t < T; ++t) {
      const __m256i s = Spread(x + 4 * t);
      even[t] = _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8);
      odd[t] = _mm256_srai_epi16(s, 8);
    }
    HALFBIN_UNROLL
    for (size_t v = 0; v < V; ++v) {
      const __m256i u = _mm256_load_si256(reinterpret_cast<const __m256i*>(codes + v * 32));
      _mm_prefetch(reinterpret_cast<const char*>(codes + kAhead + v * 32), _MM_HINT_T0);
      const __m256i u_even = _mm256_and_si256(u, even_bytes), u_odd = _mm256_srli_epi16(u, 8);
      HALFBIN_UNROLL
      for (size_t t = 0; t < T; ++t) {
        acc[t][v] = _mm256_add_epi32(acc[t][v], _mm256_madd_epi16(u_even, even[t]));
        acc[t][v] = _mm256_add_epi32(acc[t][v], _mm256_madd_epi16(u_odd, odd[t]));
      }
    }
  }
  HALFBIN_UNROLL
  for (size_t t = 0; t < T; ++t) {
    HALFBIN_UNROLL
    for (size_t v = 0; v < V; ++v) _mm256_store_si256(Vector(totals + t * kPanelRows + v * kLanes), acc[t][v]);
  }
}

template <size_t T, size_t V>
void NibblesPart(const uint8_t* codes, size_t columns, const int8_t* x, bool add, uint32_t* totals) {
  const __m256i low = _mm256_set1_epi8(0xf), ones = _mm256_set1_epi16(1);
  for (size_t c = 0; c < columns; c += 32) {
    __m256i acc[T][V];
    HALFBIN_UNROLL
    for (size_t t = 0; t < T; ++t) {
      HALFBIN_UNROLL
      for (size_t v = 0; v < V; ++v) acc[t][v] = _mm256_setzero_si256();
    }
    for (size_t i = 0; i < 4; ++i, codes += 256, x += 8 * T) {
      HALFBIN_UNROLL
      for (size_t v = 0; v < V; ++v) {
        const __m256i both = _mm256_load_si256(reinterpret_cast<const __m256i*>(codes + v * 32));
        _mm_prefetch(reinterpret_cast<const char*>(codes + kAhead + v * 32), _MM_HINT_T0);
        const __m256i u = _mm256_and_si256(both, low), next = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
        HALFBIN_UNROLL
        for (size_t t = 0; t < T; ++t) {
          const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(u, Spread(x + 4 * t)),
                                                 _mm256_maddubs_epi16(next, Spread(x + 4 * (T + t))));
          acc[t][v] = _mm256_add_epi16(acc[t][v], pairs);
        }
      }
    }
    HALFBIN_UNROLL
    for (size_t t = 0; t < T; ++t) {
      HALFBIN_UNROLL
      for (size_t v = 0; v < V; ++v) {
        __m256i* total = Vector(totals + t * kPanelRows + v * kLanes);
        const __m256i sum = _mm256_madd_epi16(acc[t][v], ones);
        _mm256_store_si256(total, add || c != 0 ? _mm256_add_epi32(_mm256_load_si256(total), sum) : sum);
      }
    }
  }
}

// 2 bits: u is at most 3, so a pair of products is at most 2 * 3 * 128 = 768 and the eight of 32 columns 6144 in 16 bits.
template <size_t T, size_t V>
void CrumbsPart(const uint8_t* codes, size_t columns, const int8_t* x, bool add, uint32_t* totals) {
  const __m256i low = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
  for (size_t c = 0; c < columns; c += 32) {
    __m256i acc[T][V];
    HALFBIN_UNROLL
    for (size_t t = 0; t < T; ++t) {
      HALFBIN_UNROLL
      for (size_t v = 0; v < V; ++v) acc[t][v] = _mm256_setzero_si256();
    }
    for (size_t i = 0; i < 2; ++i, codes += 256, x += 16 * T) {
      HALFBIN_UNROLL
      for (size_t v = 0; v < V; ++v) {
        const __m256i all = _mm256_load_si256(reinterpret_cast<const __m256i*>(codes + v * 32));
        _mm_prefetch(reinterpret_cast<const char*>(codes + kAhead + v * 32), _MM_HINT_T0);
        HALFBIN_UNROLL
        for (size_t j = 0; j < 4; ++j) {
          const __m256i u = _mm256_and_si256(_mm256_srli_epi16(all, static_cast<int>(2 * j)), low);
          HALFBIN_UNROLL
          for (size_t t = 0; t < T; ++t) {
            acc[t][v] = _mm256_add_epi16(acc[t][v], _mm256_maddubs_epi16(u, Spread(x + 4 * (j * T + t))));
          }
        }
      }
    }
    HALFBIN_UNROLL
    for (size_t t = 0; t < T; ++t) {
      HALFBIN_UNROLL
      for (size_t v = 0; v < V; ++v) {
        __m256i* total = Vector(totals + t * kPanelRows + v * kLanes);
        const __m256i sum = _mm256_madd_epi16(acc[t][v], ones);
        _mm256_store_si256(total, add || c != 0 ? _mm256_add_epi32(_mm256_load_si256(total), sum) : sum);
      }
    }
  }
}

using DotFunction = void (*)(const uint8_t*, size_t, const int8_t*, bool, uint32_t*);

// A panel in parts of V vectors.
template <DotFunction Part, size_t V>
void WholePanel(const uint8_t* codes, size_t columns, const int8_t* x, bool add, uint32_t* totals) {
  for (size_t v = 0; v < kPanelRows / kLanes; v += V) Part(codes + v * 32, columns, x, add, totals + v * kLanes);
}

constexpr DotFunction kBytes[] = {&WholePanel<&BytesPart<1, 8>, 8>, &WholePanel<&BytesPart<2, 4>, 4>,
                                  &WholePanel<&BytesPart<3, 2>, 2>, &WholePanel<&BytesPart<4, 2>, 2>};
constexpr DotFunction kNibbles[] = {&WholePanel<&NibblesPart<1, 8>, 8>, &WholePanel<&NibblesPart<2, 4>, 4>,
                                    &WholePanel<&NibblesPart<3, 2>, 2>, &WholePanel<&NibblesPart<4, 2>, 2>};

constexpr DotFunction kCrumbs[] = {&WholePanel<&CrumbsPart<1, 8>, 8>, &WholePanel<&CrumbsPart<2, 4>, 4>,
                                   &WholePanel<&CrumbsPart<3, 2>, 2>, &WholePanel<&CrumbsPart<4, 2>, 2>};

struct Dot {
  static constexpr size_t kTilesAtOnce = 1, kPartRows = kPanelRows;
  static constexpr bool kNeverUnpacks = true, kAlwaysUnpacks = false, kCentres = false;
  DotFunction bytes, nibbles, crumbs;
  explicit Dot(const Inputs& x) : bytes(kBytes[x.tile - 1]), nibbles(kNibbles[x.tile - 1]), crumbs(kCrumbs[x.tile - 1]) {}

  void Bytes(const uint8_t* codes, size_t columns, const int8_t* x, size_t, bool add, uint32_t* totals) const {
    bytes(codes, columns, x, add, totals);
  }
  void Nibbles(const uint8_t* codes, size_t columns, const int8_t* x, size_t, bool add, uint32_t* totals) const {
    nibbles(codes, columns, x, add, totals);
  }
  void Crumbs(const uint8_t* codes, size_t columns, const int8_t* x, size_t, bool add, uint32_t* totals) const {
    crumbs(codes, columns, x, add, totals);
  }
  void Centred(const uint8_t*, size_t, const int8_t*, size_t, bool, uint32_t*) const {}
  void Unpack(const uint8_t*, size_t, const uint8_t*, const Weights&, uint8_t*) const {}
};

constexpr InstructionSet kSet{"avx2", 4, 4, &RoundTokens, &Multiply<Dot>};

}  // namespace

const InstructionSet* Avx2() { return &kSet; }

}  // namespace halfbin::matmul
