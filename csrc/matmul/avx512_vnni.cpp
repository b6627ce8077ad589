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

// Where sums begin and what becomes of them: totals that are stored, or added to what is there.
struct ToTotals {
  bool add;
  uint32_t* totals;

  template <size_t T>
  void Begin(__m512i (&acc)[T][kVectors]) const {
    HALFBIN_UNROLL
    for (size_t t = 0; t < T; ++t) {
      HALFBIN_UNROLL
      for (size_t v = 0; v < kVectors; ++v) {
        acc[t][v] = add ? _mm512_load_si512(totals + t * kPanelRows + v * 16) : _mm512_setzero_si512();
      }
    }
  }

  template <size_t T>
  void End(const __m512i (&acc)[T][kVectors]) const {
    HALFBIN_UNROLL
    for (size_t t = 0; t < T; ++t) {
      HALFBIN_UNROLL
      for (size_t v = 0; v < kVectors; ++v) _mm512_store_si512(totals + t * kPanelRows + v * 16, acc[t][v]);
    }
  }
};

// A whole group: sums begin with what zero points take off, and are scaled into y without leaving their registers. Through totals in
// memory, 128 x 4096 x 4096 at int4 took 7.6 ms; so, 7.2.
struct ToOutputs {
  const GroupScales& group;
  float* y;

  template <size_t T>
  void Begin(__m512i (&acc)[T][kVectors]) const {
    HALFBIN_UNROLL
    for (size_t t = 0; t < T; ++t) {
      const uint32_t sum = static_cast<uint32_t>(group.input_sums[t]);
      HALFBIN_UNROLL
      for (size_t v = 0; v < kVectors; ++v) {
        if (group.zeros == nullptr) {
          acc[t][v] = _mm512_set1_epi32(static_cast<int32_t>(0 - group.zero * sum));
        } else {
          const __m128i zeros = _mm_load_si128(reinterpret_cast<const __m128i*>(group.zeros) + v);
          acc[t][v] = _mm512_mullo_epi32(_mm512_cvtepu8_epi32(zeros), _mm512_set1_epi32(static_cast<int32_t>(0 - sum)));
        }
      }
    }
  }

  template <size_t T>
  void End(const __m512i (&acc)[T][kVectors]) const {
    HALFBIN_UNROLL
    for (size_t v = 0; v < kVectors; ++v) {
      const __m512 scales = _mm512_load_ps(group.scales + v * 16);
      HALFBIN_UNROLL
      for (size_t t = 0; t < T; ++t) {
        float* to = y + t * kPanelRows + v * 16;
        const __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[t][v]), scales);
        _mm512_store_ps(to, _mm512_fmadd_ps(part, _mm512_set1_ps(group.group_scales[t]), _mm512_load_ps(to)));
      }
    }
  }
};

template <size_t T, class Sums>
void DotBytes(const uint8_t* codes, size_t columns, const int8_t* x, Sums sums) {
  __m512i acc[T][kVectors];
  sums.Begin(acc);
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
  sums.End(acc);
}

// Codes of `Bits` bits, 32 / Bits columns at a time: four of them for each j.
template <size_t T, unsigned Bits, bool Table, class Sums>
void DotPacked(const uint8_t* codes, size_t columns, const int8_t* x, const uint8_t* table, Sums sums) {
  constexpr size_t kSteps = 8 / Bits;
  const __m512i mask = _mm512_set1_epi8((1 << Bits) - 1);
  const __m512i values = Table ? _mm512_maskz_broadcast_i32x4(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(table))) : mask;
  __m512i acc[T][kVectors];
  sums.Begin(acc);
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
  sums.End(acc);
}

template <class Sums>
using BytesFunction = void (*)(const uint8_t*, size_t, const int8_t*, Sums);
template <class Sums>
using PackedFunction = void (*)(const uint8_t*, size_t, const int8_t*, const uint8_t*, Sums);

// By the tokens of a tile, less 1.
template <class Sums>
constexpr BytesFunction<Sums> kBytes[] = {&DotBytes<1, Sums>, &DotBytes<2, Sums>, &DotBytes<3, Sums>,
                                          &DotBytes<4, Sums>, &DotBytes<5, Sums>, &DotBytes<6, Sums>};

template <unsigned Bits, bool Table, class Sums>
constexpr PackedFunction<Sums> kPacked[] = {&DotPacked<1, Bits, Table, Sums>, &DotPacked<2, Bits, Table, Sums>,
                                            &DotPacked<3, Bits, Table, Sums>, &DotPacked<4, Bits, Table, Sums>,
                                            &DotPacked<5, Bits, Table, Sums>, &DotPacked<6, Bits, Table, Sums>};

struct Dot {
  static constexpr size_t kTilesAtOnce = 1, kPartRows = kPanelRows;
  static constexpr bool kNeverUnpacks = false, kAlwaysUnpacks = false, kCentres = false;
  size_t tile;
  explicit Dot(const Inputs& x) : tile(x.tile) {}

  void Bytes(const uint8_t* codes, size_t columns, const int8_t* x, size_t, bool add, uint32_t* totals) const {
    Any(8, codes, columns, x, nullptr, ToTotals{add, totals});
  }
  void Nibbles(const uint8_t* codes, size_t columns, const int8_t* x, size_t, bool add, uint32_t* totals) const {
    Any(4, codes, columns, x, nullptr, ToTotals{add, totals});
  }
  void Crumbs(const uint8_t* codes, size_t columns, const int8_t* x, size_t, bool add, uint32_t* totals) const {
    Any(2, codes, columns, x, nullptr, ToTotals{add, totals});
  }
  void LookedUp(const uint8_t* codes, size_t columns, const int8_t* x, size_t, bool add, uint32_t* totals,
                const uint8_t* table) const {
    Any(4, codes, columns, x, table, ToTotals{add, totals});
  }
  bool Scaled(uint32_t bits, bool, const uint8_t* codes, size_t columns, const int8_t* x, size_t, const uint8_t* table,
              const GroupScales& group, float* y, uint32_t*) const {
    Any(bits, codes, columns, x, table, ToOutputs{group, y});
    return true;
  }

  template <class Sums>
  void Any(uint32_t bits, const uint8_t* codes, size_t columns, const int8_t* x, const uint8_t* table, Sums sums) const {
    if (bits == 8) return kBytes<Sums>[tile - 1](codes, columns, x, sums);
    if (bits == 2) return kPacked<2, false, Sums>[tile - 1](codes, columns, x, table, sums);
    if (table == nullptr) return kPacked<4, false, Sums>[tile - 1](codes, columns, x, table, sums);
    kPacked<4, true, Sums>[tile - 1](codes, columns, x, table, sums);
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
