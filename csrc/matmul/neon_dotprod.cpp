// Arm's dot product instructions: tiles of up to 8 tokens, 14 to 24 accumulators of the 32 registers, each of four rows of a token.
//
// `sdot` multiplies signed by signed bytes, in lanes of four columns; a lane of the inputs is taken for all rows.
// 4 bits: u is at most 15, so it is signed as it stands.
// 8 bits: u - 128 is signed, and sum s u = sum s (u - 128) + 128 sum s. The second sum is a token's, so totals begin with it.
//
// No prefetching and no share of the registers here was measured: there was no such processor, only an emulator.
#include "matmul/neon_steps.h"

namespace halfbin::matmul {
namespace {

constexpr size_t kRun = 16;  // columns of an input vector, four lanes

enum class Codes { kNibbles, kUnsigned, kSigned };  // as they lie, of 4 bits and of 8; and less z

template <Codes C>
constexpr size_t kBytesPerRun = C == Codes::kNibbles ? kRun * kPanelRows / 2 : kRun * kPanelRows;

// Four columns, lane `Lane` of the inputs, of four rows, and of T tokens.
template <int Lane, size_t T, size_t V>
inline void AddLane(int8x16_t codes, const int8x16_t (&s)[T], size_t v, int32x4_t (&acc)[T][V]) {
  HALFBIN_UNROLL
  for (size_t t = 0; t < T; ++t) acc[t][v] = vdotq_laneq_s32(acc[t][v], codes, s[t], Lane);
}

// Lanes `Pair` * 2 and the next.
template <int Pair, Codes C, size_t T, size_t V>
inline void AddLanes(const uint8_t* codes, const int8x16_t (&s)[T], int32x4_t (&acc)[T][V]) {
  HALFBIN_UNROLL_VECTORS
  for (size_t v = 0; v < V; ++v) {
    Columns u;
    if constexpr (C == Codes::kNibbles) {
      u = LoadNibbles(codes + 256 * Pair + 16 * v);
    } else {
      u = {vld1q_u8(codes + 512 * Pair + 16 * v), vld1q_u8(codes + 512 * Pair + 256 + 16 * v)};
    }
    if constexpr (C == Codes::kUnsigned) {
      const uint8x16_t half = vdupq_n_u8(0x80);
      u = {veorq_u8(u.first, half), veorq_u8(u.next, half)};
    }
    AddLane<2 * Pair>(vreinterpretq_s8_u8(u.first), s, v, acc);
    AddLane<2 * Pair + 1>(vreinterpretq_s8_u8(u.next), s, v, acc);
  }
}

// V vectors of rows, T tokens. `begin`: what totals of each token begin with, or what is added to them.
template <Codes C, size_t T, size_t V>
void Part(const uint8_t* codes, size_t columns, const int8_t* x, bool add, const uint32_t (&begin)[T], uint32_t* totals) {
  int32x4_t acc[T][V];
  HALFBIN_UNROLL
  for (size_t t = 0; t < T; ++t) {
    HALFBIN_UNROLL_VECTORS
    for (size_t v = 0; v < V; ++v) {
      const uint32x4_t from = vdupq_n_u32(begin[t]);
      acc[t][v] = vreinterpretq_s32_u32(add ? vaddq_u32(vld1q_u32(totals + t * kPanelRows + v * kLanes), from) : from);
    }
  }
  for (size_t c = 0; c < columns; c += kRun, codes += kBytesPerRun<C>, x += kRun * T) {
    int8x16_t s[T];
    HALFBIN_UNROLL
    for (size_t t = 0; t < T; ++t) s[t] = vld1q_s8(x + kRun * t);
    AddLanes<0, C>(codes, s, acc);
    AddLanes<1, C>(codes, s, acc);
  }
  HALFBIN_UNROLL
  for (size_t t = 0; t < T; ++t) {
    HALFBIN_UNROLL_VECTORS
    for (size_t v = 0; v < V; ++v) vst1q_u32(totals + t * kPanelRows + v * kLanes, vreinterpretq_u32_s32(acc[t][v]));
  }
}

// 128 times the sum of each token's codes.
template <size_t T>
inline void SumInputs(const int8_t* x, size_t columns, uint32_t (&out)[T]) {
  int32x4_t sums[T];
  HALFBIN_UNROLL
  for (size_t t = 0; t < T; ++t) sums[t] = vdupq_n_s32(0);
  for (size_t c = 0; c < columns; c += kRun, x += kRun * T) {
    HALFBIN_UNROLL
    for (size_t t = 0; t < T; ++t) sums[t] = vdotq_s32(sums[t], vld1q_s8(x + kRun * t), vdupq_n_s8(1));
  }
  for (size_t t = 0; t < T; ++t) out[t] = static_cast<uint32_t>(vaddvq_s32(sums[t])) * 128;
}

// A panel in parts of V vectors, which share columns that stay in the first cache.
template <Codes C, size_t T, size_t V>
void Panel(const uint8_t* codes, size_t columns, const int8_t* x, bool add, uint32_t* totals) {
  for (size_t c = 0; c < columns; c += kColumnChunk) {
    const size_t here = columns - c < kColumnChunk ? columns - c : kColumnChunk;
    uint32_t begin[T] = {};
    if constexpr (C == Codes::kUnsigned) SumInputs<T>(x + c * T, here, begin);
    const uint8_t* chunk = codes + c / kRun * kBytesPerRun<C>;
    for (size_t v = 0; v < kVectors; v += V) {
      Part<C, T, V>(chunk + v * 16, here, x + c * T, add || c != 0, begin, totals + v * kLanes);
    }
  }
}

using DotFunction = void (*)(const uint8_t*, size_t, const int8_t*, bool, uint32_t*);

// By the tokens of a tile, less 1.
template <Codes C>
constexpr DotFunction kPanels[] = {&Panel<C, 1, 16>, &Panel<C, 2, 8>, &Panel<C, 3, 8>, &Panel<C, 4, 4>,
                                   &Panel<C, 5, 4>,  &Panel<C, 6, 4>, &Panel<C, 7, 2>, &Panel<C, 8, 2>};

struct Dot {
  static constexpr size_t kTilesAtOnce = 1, kPartRows = kPanelRows;
  static constexpr bool kNeverUnpacks = false, kAlwaysUnpacks = false, kCentres = true;
  DotFunction bytes, nibbles, centred;
  explicit Dot(const Inputs& x)
      : bytes(kPanels<Codes::kUnsigned>[x.tile - 1]),
        nibbles(kPanels<Codes::kNibbles>[x.tile - 1]),
        centred(kPanels<Codes::kSigned>[x.tile - 1]) {}

  void Bytes(const uint8_t* codes, size_t columns, const int8_t* x, size_t, bool add, uint32_t* totals) const {
    bytes(codes, columns, x, add, totals);
  }
  void Nibbles(const uint8_t* codes, size_t columns, const int8_t* x, size_t, bool add, uint32_t* totals) const {
    nibbles(codes, columns, x, add, totals);
  }
  void Centred(const uint8_t* codes, size_t columns, const int8_t* x, size_t, bool add, uint32_t* totals) const {
    centred(codes, columns, x, add, totals);
  }

  // To weights.h's layout of 8 bits.
  void Unpack(const uint8_t* codes, size_t columns, const uint8_t* block, const Weights& w, uint8_t* out) const {
    alignas(16) uint8_t zeros[4 * kPanelRows];
    SpreadZeros(block, w, zeros);
    for (size_t c = 0; c < columns; c += 8, codes += 256, out += 512) {
      for (size_t at = 0; at < 256; at += 16) {
        const Columns u = LoadCentred(codes + at, zeros + at);
        vst1q_u8(out + at, u.first);
        vst1q_u8(out + 256 + at, u.next);
      }
    }
  }
};

constexpr InstructionSet kSet{"neon_dotprod", 8, kRun, &RoundTokens<NeonLoops>, &Multiply<Dot>};

}  // namespace

const InstructionSet* NeonDotprod() { return &kSet; }

}  // namespace halfbin::matmul
