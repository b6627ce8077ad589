// AMX: 16 tokens x 16 rows x 64 columns in one instruction, two tiles of tokens and two of rows at a time.
//
// The layout of 8-bit codes is the one that a tile of B wants: 64 bytes are four columns of 16 rows, and the next four columns of the
// same rows follow 256 bytes later. Inputs lie as tiles of A: [tokens][run] bytes. Tile registers:
//
//   0 .. 3  totals, [two tiles of tokens] x [two of 16 rows]
//   4, 5    inputs        6, 7  codes
#include "matmul/avx512_codes.h"

namespace halfbin::matmul {
namespace {

// Written out, as gcc's own do not say that they read and write memory. N, A, B: numbers of tile registers.
template <int N>
inline void LoadTile(const void* from, size_t row_bytes) {
  __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(N), "r"(from), "r"(row_bytes) : "memory");
}

template <int N>
inline void StoreTile(void* to, size_t row_bytes) {
  __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(N), "r"(to), "r"(row_bytes) : "memory");
}

template <int N>
inline void ClearTile() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(N));
}

// N += A @ B for signed codes of inputs in A and codes of rows in B, signed or not.
template <bool Signed, int N, int A, int B>
inline void DotTile() {
  if constexpr (Signed) {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(N), "i"(A), "i"(B));
  } else {
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(N), "i"(A), "i"(B));
  }
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

struct Dot {
  static constexpr size_t kTilesAtOnce = 2, kPartRows = 32;
  static constexpr bool kNeverUnpacks = false, kAlwaysUnpacks = true, kCentres = true;
  size_t tile, run, next_tile, groups;  // next_tile: bytes from one tile of inputs to the next

  explicit Dot(const Inputs& x) : tile(x.tile), run(x.run), next_tile(x.groups * x.padded * x.tile), groups(x.groups) {
    TileConfig config;
    for (int i = 0; i < 4; ++i) config.row_bytes[i] = 64, config.rows[i] = static_cast<uint8_t>(tile);
    for (int i = 4; i < 6; ++i) config.row_bytes[i] = static_cast<uint16_t>(run), config.rows[i] = static_cast<uint8_t>(tile);
    for (int i = 6; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = static_cast<uint8_t>(run / 4);
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
  }
  Dot(const Dot&) = delete;
  Dot& operator=(const Dot&) = delete;
  ~Dot() { __asm__ volatile("tilerelease"); }

  // Totals, in registers 0 to 3, += products of 32 rows of the panel and two tiles of tokens.
  template <bool Signed>
  [[gnu::always_inline]] void AddTwo(const uint8_t* codes, size_t columns, const int8_t* x) const {
    const size_t run = this->run, step = run * tile, next_tile = this->next_tile;
    for (size_t c = 0; c < columns; c += run, codes += run * kPanelRows, x += step) {
      LoadTile<6>(codes, 256);
      LoadTile<4>(x, run);
      DotTile<Signed, 0, 4, 6>();
      LoadTile<7>(codes + 64, 256);
      DotTile<Signed, 1, 4, 7>();
      LoadTile<5>(x + next_tile, run);
      DotTile<Signed, 2, 5, 6>();
      DotTile<Signed, 3, 5, 7>();
    }
  }

  // The same for one tile of tokens, in registers 0 and 1.
  template <bool Signed>
  [[gnu::always_inline]] void AddOne(const uint8_t* codes, size_t columns, const int8_t* x) const {
    const size_t run = this->run, step = run * tile;
    for (size_t c = 0; c < columns; c += run, codes += run * kPanelRows, x += step) {
      LoadTile<4>(x, run);
      LoadTile<6>(codes, 256);
      DotTile<Signed, 0, 4, 6>();
      LoadTile<7>(codes + 64, 256);
      DotTile<Signed, 1, 4, 7>();
    }
  }

  template <bool Signed>
  [[gnu::noinline]] void TwoByTwo(const uint8_t* codes, size_t columns, const int8_t* x, bool add, uint32_t* totals) const {
    uint32_t* second = totals + tile * kPanelRows;
    if (add) {
      LoadTile<0>(totals, 256), LoadTile<1>(totals + 16, 256);
      LoadTile<2>(second, 256), LoadTile<3>(second + 16, 256);
    } else {
      ClearTile<0>(), ClearTile<1>(), ClearTile<2>(), ClearTile<3>();
    }
    AddTwo<Signed>(codes, columns, x);
    StoreTile<0>(totals, 256), StoreTile<1>(totals + 16, 256);
    StoreTile<2>(second, 256), StoreTile<3>(second + 16, 256);
  }

  template <bool Signed>
  void OneByTwo(const uint8_t* codes, size_t columns, const int8_t* x, bool add, uint32_t* totals) const {
    if (add) {
      LoadTile<0>(totals, 256), LoadTile<1>(totals + 16, 256);
    } else {
      ClearTile<0>(), ClearTile<1>();
    }
    AddOne<Signed>(codes, columns, x);
    StoreTile<0>(totals, 256), StoreTile<1>(totals + 16, 256);
  }

  void Bytes(const uint8_t* codes, size_t columns, const int8_t* x, size_t tiles, bool add, uint32_t* totals) const {
    if (tiles == 1) return OneByTwo<false>(codes, columns, x, add, totals);
    TwoByTwo<false>(codes, columns, x, add, totals);
  }
  void Centred(const uint8_t* codes, size_t columns, const int8_t* x, size_t tiles, bool add, uint32_t* totals) const {
    if (tiles == 1) return OneByTwo<true>(codes, columns, x, add, totals);
    TwoByTwo<true>(codes, columns, x, add, totals);
  }

  // y[t][r] += float(totals[t][r]) * scales[r] * group_scales[t] for 32 rows of a panel, totals [tokens][32].
  static void AddScaled(const uint32_t* totals, size_t tokens, __m512 first, __m512 second, const float* group_scales, float* y) {
    for (size_t t = 0; t < tokens; ++t, totals += 32, y += kPanelRows) {
      const __m512 group_scale = _mm512_set1_ps(group_scales[t]);
      const __m512 a = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(totals)), first);
      const __m512 b = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(totals + 16)), second);
      _mm512_store_ps(y, _mm512_fmadd_ps(a, group_scale, _mm512_load_ps(y)));
      _mm512_store_ps(y + 16, _mm512_fmadd_ps(b, group_scale, _mm512_load_ps(y + 16)));
    }
  }

  bool Scaled(uint32_t, bool centred, const uint8_t* codes, size_t columns, const int8_t* x, size_t tiles, const uint8_t*,
              const GroupScales& group, float* y, uint32_t* memory) const {
    if (centred) ScaledTiles(codes, columns, x, tiles, group, y, memory);
    return centred;
  }

  // A group of a few columns is little work: what surrounds its products must be less. With totals of a whole block of tokens in memory
  // and scaled by the loops of steps.h, 512 x 4096 x 4096 in groups of 128 took 14.5 ms; so, 10.7.
  [[gnu::noinline]] void ScaledTiles(const uint8_t* codes, size_t columns, const int8_t* x, size_t tiles, const GroupScales& group,
                                     float* y, uint32_t* totals) const {
    const size_t tokens = tile;
    uint32_t* second = totals + tokens * 32;
    ClearTile<0>(), ClearTile<1>();
    if (tiles == 1) {
      AddOne<true>(codes, columns, x);
    } else {
      ClearTile<2>(), ClearTile<3>();
      AddTwo<true>(codes, columns, x);
    }
    StoreTile<0>(totals, 128), StoreTile<1>(totals + 16, 128);
    const __m512 a = _mm512_load_ps(group.scales), b = _mm512_load_ps(group.scales + 16);
    if (tiles == 2) StoreTile<2>(second, 128), StoreTile<3>(second + 16, 128);
    AddScaled(totals, tokens, a, b, group.group_scales, y);
    if (tiles == 2) AddScaled(second, tokens, a, b, group.group_scales + groups * tokens, y + tokens * kPanelRows);
  }

  void Nibbles(const uint8_t*, size_t, const int8_t*, size_t, bool, uint32_t*) const {}

  // Less the zero points: what is left fits int8, and totals need no correction.
  void Unpack(const uint8_t* codes, size_t columns, const uint8_t* block, const Weights& w, uint8_t* out) const {
    __m512i zeros[4];
    HALFBIN_UNROLL
    for (size_t v = 0; v < 4; ++v) {
      const __m128i* stored = reinterpret_cast<const __m128i*>(block + w.zeros_at) + v;
      const __m512i rows = w.header.has_zeros ? _mm512_maskz_cvtepu8_epi32(0xffff, _mm_load_si128(stored))
                                              : _mm512_set1_epi32(w.header.zero);
      zeros[v] = _mm512_mullo_epi32(rows, _mm512_set1_epi32(0x01010101));
    }
    UnpackNibbles(codes, columns, zeros, out);
  }
};

constexpr InstructionSet kSet{"amx_int8", 16, 64, &RoundTokens<Avx512Loops>, &Multiply<Dot>};

}  // namespace

const InstructionSet* AmxInt8() { return &kSet; }

}  // namespace halfbin::matmul
