// The plain form, for any processor: what the others must equal to the bit.
#include "matmul/steps.h"

namespace halfbin::matmul {
namespace {

struct Dot {
  static constexpr size_t kTilesAtOnce = 1, kPartRows = kPanelRows;
  static constexpr bool kNeverUnpacks = true, kAlwaysUnpacks = false, kCentres = false;
  size_t tile;
  explicit Dot(const Inputs& x) : tile(x.tile) {}

  // One row's code at each of four columns of `lane`, times those of every token.
  void AddLane(const uint8_t* lane, int shift, unsigned mask, const int8_t* x, size_t r, uint32_t* totals) const {
    for (size_t t = 0; t < tile; ++t) {
      for (size_t j = 0; j < 4; ++j) {
        const int32_t u = static_cast<int32_t>(lane[j] >> shift & mask);
        totals[t * kPanelRows + r] += static_cast<uint32_t>(u * x[t * 4 + j]);
      }
    }
  }

  void Bytes(const uint8_t* codes, size_t columns, const int8_t* x, size_t, bool add, uint32_t* totals) const {
    if (!add) std::memset(totals, 0, tile * kPanelRows * 4);
    for (size_t c = 0; c < columns; c += 4) {
      for (size_t r = 0; r < kPanelRows; ++r) AddLane(codes + c * kPanelRows + r * 4, 0, 0xff, x + c * tile, r, totals);
    }
  }

  void Nibbles(const uint8_t* codes, size_t columns, const int8_t* x, size_t, bool add, uint32_t* totals) const {
    if (!add) std::memset(totals, 0, tile * kPanelRows * 4);
    for (size_t c = 0; c < columns; c += 8) {
      for (size_t r = 0; r < kPanelRows; ++r) {
        const uint8_t* lane = codes + c * kPanelRows / 2 + r * 4;
        AddLane(lane, 0, 0xf, x + c * tile, r, totals);
        AddLane(lane, 4, 0xf, x + (c + 4) * tile, r, totals);
      }
    }
  }

  void Centred(const uint8_t*, size_t, const int8_t*, size_t, bool, uint32_t*) const {}
  void Unpack(const uint8_t*, size_t, const uint8_t*, const Weights&, uint8_t*) const {}
};

constexpr InstructionSet kSet{"portable", 8, 4, &RoundTokens, &Multiply<Dot>};

}  // namespace

const InstructionSet* Portable() { return &kSet; }

}  // namespace halfbin::matmul
