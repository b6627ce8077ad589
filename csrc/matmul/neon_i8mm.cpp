// Arm's matrix product instructions for bytes: tiles of up to 8 tokens, 16 to 24 accumulators of the 32 registers.
//
// `usmmla` and `smmla` add the products of two rows and two tokens over eight columns, `usdot` is for one token. Codes lie as four
// columns of four rows a vector; with the next four columns of the same rows, a zip makes rows of eight:
//
//   columns 0 to 3:  r0 r1 r2 r3     columns 4 to 7:  R0 R1 R2 R3     zipped:  r0 R0 r1 R1 | r2 R2 r3 R3        32 bits each
//
// An accumulator of rows 0, 1 and tokens s, t is  0s 0t 1s 1t;  with that of rows 2, 3 it is unzipped to four rows of a token.
// Where the last token has no partner it is its own.
//
// No prefetching and no share of the registers here was measured: there was no such processor, only an emulator.
#include "matmul/neon_steps.h"

namespace halfbin::matmul {
namespace {

constexpr size_t kRun = 8;  // columns of an input in a vector of two tokens

enum class Codes { kNibbles, kUnsigned, kCentred };  // as they lie, of 4 bits and of 8; and as Unpack writes them

template <Codes C>
constexpr size_t kBytesPerRun = C == Codes::kNibbles ? kRun * kPanelRows / 2 : kRun * kPanelRows;

// Eight columns of four rows: the first two rows, the others.
struct Rows {
  uint8x16_t low, high;
};

inline Rows Zip(const Columns& u) {
  const uint32x4_t first = vreinterpretq_u32_u8(u.first), next = vreinterpretq_u32_u8(u.next);
  return {vreinterpretq_u8_u32(vzip1q_u32(first, next)), vreinterpretq_u8_u32(vzip2q_u32(first, next))};
}

template <Codes C>
inline Rows LoadRows(const uint8_t* codes, size_t v) {
  if constexpr (C == Codes::kNibbles) return Zip(LoadNibbles(codes + 16 * v));
  if constexpr (C == Codes::kUnsigned) return Zip({vld1q_u8(codes + 16 * v), vld1q_u8(codes + 256 + 16 * v)});
  return {vld1q_u8(codes + 32 * v), vld1q_u8(codes + 32 * v + 16)};
}

template <Codes C>
inline int32x4_t TwoByTwo(int32x4_t acc, uint8x16_t rows, int8x16_t tokens) {
  if constexpr (C == Codes::kCentred) return vmmlaq_s32(acc, vreinterpretq_s8_u8(rows), tokens);
  return vusmmlaq_s32(acc, rows, tokens);
}

// V vectors of rows, T tokens, in pairs.
template <Codes C, size_t T, size_t V>
void Part(const uint8_t* codes, size_t columns, const int8_t* x, bool add, uint32_t* totals) {
  constexpr size_t kPairs = (T + 1) / 2;
  const auto second = [](size_t pair) { return 2 * pair + 1 < T ? 2 * pair + 1 : 2 * pair; };
  int32x4_t low[kPairs][V], high[kPairs][V];
  HALFBIN_UNROLL
  for (size_t p = 0; p < kPairs; ++p) {
    HALFBIN_UNROLL_VECTORS
    for (size_t v = 0; v < V; ++v) {
      low[p][v] = high[p][v] = vdupq_n_s32(0);
      if (add) {
        const uint32x4_t one = vld1q_u32(totals + 2 * p * kPanelRows + v * kLanes);
        const uint32x4_t two = vld1q_u32(totals + second(p) * kPanelRows + v * kLanes);
        low[p][v] = vreinterpretq_s32_u32(vzip1q_u32(one, two));
        high[p][v] = vreinterpretq_s32_u32(vzip2q_u32(one, two));
      }
    }
  }
  for (size_t c = 0; c < columns; c += kRun, codes += kBytesPerRun<C>, x += kRun * T) {
    int8x16_t s[kPairs];
    HALFBIN_UNROLL
    for (size_t p = 0; p < kPairs; ++p) {
      const int8_t* from = x + 2 * kRun * p;
      s[p] = 2 * p + 1 < T ? vld1q_s8(from) : vcombine_s8(vld1_s8(from), vld1_s8(from));
    }
    HALFBIN_UNROLL_VECTORS
    for (size_t v = 0; v < V; ++v) {
      const Rows u = LoadRows<C>(codes, v);
      HALFBIN_UNROLL
      for (size_t p = 0; p < kPairs; ++p) {
        low[p][v] = TwoByTwo<C>(low[p][v], u.low, s[p]);
        high[p][v] = TwoByTwo<C>(high[p][v], u.high, s[p]);
      }
    }
  }
  HALFBIN_UNROLL
  for (size_t p = 0; p < kPairs; ++p) {
    HALFBIN_UNROLL_VECTORS
    for (size_t v = 0; v < V; ++v) {
      const uint32x4_t first = vreinterpretq_u32_s32(low[p][v]), next = vreinterpretq_u32_s32(high[p][v]);
      vst1q_u32(totals + 2 * p * kPanelRows + v * kLanes, vuzp1q_u32(first, next));
      if (2 * p + 1 < T) vst1q_u32(totals + (2 * p + 1) * kPanelRows + v * kLanes, vuzp2q_u32(first, next));
    }
  }
}

// A panel in parts of V vectors, which share columns that stay in the first cache.
template <Codes C, size_t T, size_t V>
void Panel(const uint8_t* codes, size_t columns, const int8_t* x, bool add, uint32_t* totals) {
  constexpr size_t kVectorBytes = C == Codes::kCentred ? 32 : 16;
  for (size_t c = 0; c < columns; c += kColumnChunk) {
    const size_t here = columns - c < kColumnChunk ? columns - c : kColumnChunk;
    const uint8_t* chunk = codes + c / kRun * kBytesPerRun<C>;
    for (size_t v = 0; v < kVectors; v += V) {
      Part<C, T, V>(chunk + v * kVectorBytes, here, x + c * T, add || c != 0, totals + v * kLanes);
    }
  }
}

// One token, eight columns of all rows: lanes `Half` * 2 and the next of 16 input codes.
template <Codes C, int Half>
inline void AddHalf(const uint8_t* codes, int8x16_t s, int32x4_t (&acc)[kVectors]) {
  HALFBIN_UNROLL_VECTORS
  for (size_t v = 0; v < kVectors; ++v) {
    Columns u;
    if constexpr (C == Codes::kNibbles) {
      u = LoadNibbles(codes + 16 * v);
    } else {
      u = {vld1q_u8(codes + 16 * v), vld1q_u8(codes + 256 + 16 * v)};
    }
    acc[v] = vusdotq_laneq_s32(acc[v], u.first, s, 2 * Half);
    acc[v] = vusdotq_laneq_s32(acc[v], u.next, s, 2 * Half + 1);
  }
}

template <Codes C>
void OneToken(const uint8_t* codes, size_t columns, const int8_t* x, bool add, uint32_t* totals) {
  int32x4_t acc[kVectors];
  HALFBIN_UNROLL_VECTORS
  for (size_t v = 0; v < kVectors; ++v) {
    acc[v] = add ? vreinterpretq_s32_u32(vld1q_u32(totals + v * kLanes)) : vdupq_n_s32(0);
  }
  for (size_t c = 0; c < columns; c += 2 * kRun, codes += 2 * kBytesPerRun<C>) {
    const int8x16_t s = vld1q_s8(x + c);
    AddHalf<C, 0>(codes, s, acc);
    AddHalf<C, 1>(codes + kBytesPerRun<C>, s, acc);
  }
  HALFBIN_UNROLL_VECTORS
  for (size_t v = 0; v < kVectors; ++v) vst1q_u32(totals + v * kLanes, vreinterpretq_u32_s32(acc[v]));
}

using DotFunction = void (*)(const uint8_t*, size_t, const int8_t*, bool, uint32_t*);

// By the tokens of a tile, less 1. Codes are centred for several tiles: the smallest of those, where 9 tokens are two, has 5.
template <Codes C>
constexpr DotFunction kPanels[] = {C == Codes::kCentred ? &Panel<C, 1, 8> : &OneToken<C>,
                                   &Panel<C, 2, 8>,
                                   &Panel<C, 3, 4>,
                                   &Panel<C, 4, 4>,
                                   &Panel<C, 5, 4>,
                                   &Panel<C, 6, 4>,
                                   &Panel<C, 7, 2>,
                                   &Panel<C, 8, 2>};

struct Dot {
  static constexpr size_t kTilesAtOnce = 1, kPartRows = kPanelRows;
  static constexpr bool kNeverUnpacks = false, kAlwaysUnpacks = false, kCentres = true;
  DotFunction bytes, nibbles, centred;
  explicit Dot(const Inputs& x)
      : bytes(kPanels<Codes::kUnsigned>[x.tile - 1]),
        nibbles(kPanels<Codes::kNibbles>[x.tile - 1]),
        centred(kPanels<Codes::kCentred>[x.tile - 1]) {}

  void Bytes(const uint8_t* codes, size_t columns, const int8_t* x, size_t, bool add, uint32_t* totals) const {
    bytes(codes, columns, x, add, totals);
  }
  void Nibbles(const uint8_t* codes, size_t columns, const int8_t* x, size_t, bool add, uint32_t* totals) const {
    nibbles(codes, columns, x, add, totals);
  }
  void Centred(const uint8_t* codes, size_t columns, const int8_t* x, size_t, bool add, uint32_t* totals) const {
    centred(codes, columns, x, add, totals);
  }

  // Zipped: 512 bytes are eight columns, of which 32 bytes are four rows.
  void Unpack(const uint8_t* codes, size_t columns, const uint8_t* block, const Weights& w, uint8_t* out) const {
    alignas(16) uint8_t zeros[4 * kPanelRows];
    SpreadZeros(block, w, zeros);
    for (size_t c = 0; c < columns; c += 8, codes += 256, out += 512) {
      for (size_t at = 0; at < 256; at += 16) {
        const Rows u = Zip(LoadCentred(codes + at, zeros + at));
        vst1q_u8(out + 2 * at, u.low);
        vst1q_u8(out + 2 * at + 16, u.high);
      }
    }
  }
};

constexpr InstructionSet kSet{"neon_i8mm", 8, kRun, &RoundTokens<NeonLoops>, &Multiply<Dot>};

}  // namespace

const InstructionSet* NeonI8mm() { return &kSet; }

}  // namespace halfbin::matmul
