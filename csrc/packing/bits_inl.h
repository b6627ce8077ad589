// Eight codes in a 64-bit word at a time: neighbouring codes are pushed together, then the pairs, then the fours. With 3 bits,
// the last code on the left, a dot for each unused bit:
//
//     .....hhh .....ggg .....fff .....eee .....ddd .....ccc .....bbb .....aaa
//     ..........hhhggg  ..........fffeee  ..........dddccc  ..........bbbaaa       every upper byte 5 bits down
//     ....................hhhgggfffeee    ....................dddcccbbbaaa         every upper pair 10 bits down
//     ........................................hhhgggfffeeedddcccbbbaaa             the upper four 20 bits down
//
// Included once by each instruction set, which the compiler then vectorises for; HALFBIN_TARGET is the namespace of that set.
#include <cstring>

#include "packing/bits.h"

namespace halfbin::HALFBIN_TARGET {
namespace {

constexpr uint64_t Every(uint64_t mask, int period) {
  uint64_t all = 0;
  for (int at = 0; at < 64; at += period) all |= mask << at;
  return all;
}

constexpr uint64_t Ones(int bits) { return (uint64_t{1} << bits) - 1; }

template <int kBits>
inline uint64_t Fold(uint64_t w) {
  w = (w & Every(Ones(kBits), 16)) | (w >> (8 - kBits) & Every(Ones(kBits) << kBits, 16));
  w = (w & Every(Ones(2 * kBits), 32)) | (w >> 2 * (8 - kBits) & Every(Ones(2 * kBits) << 2 * kBits, 32));
  return (w & Ones(4 * kBits)) | (w >> 4 * (8 - kBits) & Ones(4 * kBits) << 4 * kBits);
}

template <int kBits>
inline uint64_t Unfold(uint64_t w) {
  w = (w & Ones(4 * kBits)) | (w << 4 * (8 - kBits) & Ones(4 * kBits) << 32);
  w = (w & Every(Ones(2 * kBits), 32)) | (w << 2 * (8 - kBits) & Every(Ones(2 * kBits) << 16, 32));
  return (w & Every(Ones(kBits), 16)) | (w << (8 - kBits) & Every(Ones(kBits) << 8, 16));
}

// Byte by byte, without carries between bytes.
inline uint64_t SubtractBytes(uint64_t a, uint64_t b) {
  const uint64_t top = Every(0x80, 8);
  return ((a | top) - (b & ~top)) ^ ((a ^ ~b) & top);
}
inline uint64_t AddBytes(uint64_t a, uint64_t b) {
  const uint64_t top = Every(0x80, 8);
  return ((a & ~top) + (b & ~top)) ^ ((a ^ b) & top);
}

// Two codes a byte: 16 bits of codes fold to 8.
inline uint64_t PackNibbles(const uint8_t* codes, size_t count, uint8_t lowest, uint8_t* packed) {
  uint16_t surplus = 0;
  for (size_t i = 0; i < count / 2; ++i) {
    const uint8_t even = static_cast<uint8_t>(codes[2 * i] - lowest), odd = static_cast<uint8_t>(codes[2 * i + 1] - lowest);
    surplus |= even | odd;
    packed[i] = static_cast<uint8_t>(even | odd << 4);
  }
  return surplus & 0xf0;
}

template <int kBits>
bool Pack(const uint8_t* codes, size_t count, uint8_t lowest, uint8_t* packed) {
  constexpr uint64_t kSurplus = Every(0xff & ~Ones(kBits), 8);
  const uint64_t low = Every(1, 8) * lowest;
  uint64_t surplus = 0;
  const auto folded = [&](uint64_t w) {
    w = SubtractBytes(w, low);
    surplus |= w & kSurplus;
    return Fold<kBits>(w);
  };
  size_t i = 0;
  if constexpr (kBits == 4) {
    i = count / 2 * 2;
    surplus = PackNibbles(codes, i, lowest, packed);
    packed += i / 2;
  } else {
    // While eight more words follow, all of a word may be written: what is too much is written over.
    for (; i + 128 <= count; i += 64, packed += 8 * kBits) {
      uint64_t w[8];
      std::memcpy(w, codes + i, 64);
      for (uint64_t& word : w) word = folded(word);
      for (int j = 0; j < 8; ++j) std::memcpy(packed + j * kBits, &w[j], 8);
    }
    for (; i + 8 <= count; i += 8, packed += kBits) {
      uint64_t w;
      std::memcpy(&w, codes + i, 8);
      w = folded(w);
      std::memcpy(packed, &w, kBits);
    }
  }
  if (i < count) {
    uint64_t w = low;
    std::memcpy(&w, codes + i, count - i);
    w = folded(w);
    std::memcpy(packed, &w, PackedSize(count - i, kBits));
  }
  return surplus == 0;
}

template <int kBits>
void Unpack(const uint8_t* packed, size_t count, uint8_t lowest, uint8_t* codes) {
  const uint64_t low = Every(1, 8) * lowest;
  size_t i = 0;
  if constexpr (kBits == 4) {
    for (; i < count / 2 * 2; i += 2, ++packed) {
      codes[i] = static_cast<uint8_t>((*packed & 15) + lowest);
      codes[i + 1] = static_cast<uint8_t>((*packed >> 4) + lowest);
    }
  } else {
    for (; i + 128 <= count; i += 64, packed += 8 * kBits) {  // while eight more words follow, all of a word may be read
      uint64_t w[8];
      for (int j = 0; j < 8; ++j) std::memcpy(&w[j], packed + j * kBits, 8);
      for (uint64_t& word : w) word = AddBytes(Unfold<kBits>(word), low);
      std::memcpy(codes + i, w, 64);
    }
  }
  for (; i + 8 <= count; i += 8, packed += kBits) {
    uint64_t w = 0;
    std::memcpy(&w, packed, kBits);
    w = AddBytes(Unfold<kBits>(w), low);
    std::memcpy(codes + i, &w, 8);
  }
  if (i < count) {
    uint64_t w = 0;
    std::memcpy(&w, packed, PackedSize(count - i, kBits));
    w = AddBytes(Unfold<kBits>(w), low);
    std::memcpy(codes + i, &w, count - i);
  }
}

template <>
bool Pack<8>(const uint8_t* codes, size_t count, uint8_t lowest, uint8_t* packed) {
  for (size_t i = 0; i < count; ++i) packed[i] = static_cast<uint8_t>(codes[i] - lowest);
  return true;
}

template <>
void Unpack<8>(const uint8_t* packed, size_t count, uint8_t lowest, uint8_t* codes) {
  for (size_t i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(packed[i] + lowest);
}

using Packer = bool (*)(const uint8_t*, size_t, uint8_t, uint8_t*);
using Unpacker = void (*)(const uint8_t*, size_t, uint8_t, uint8_t*);
constexpr Packer kPackers[] = {Pack<1>, Pack<2>, Pack<3>, Pack<4>, Pack<5>, Pack<6>, Pack<7>, Pack<8>};
constexpr Unpacker kUnpackers[] = {Unpack<1>, Unpack<2>, Unpack<3>, Unpack<4>, Unpack<5>, Unpack<6>, Unpack<7>, Unpack<8>};

bool PackKernel(const uint8_t* codes, size_t count, int bits, uint8_t lowest, uint8_t* packed) {
  return kPackers[bits - 1](codes, count, lowest, packed);
}

void UnpackKernel(const uint8_t* packed, size_t count, int bits, uint8_t lowest, uint8_t* codes) {
  kUnpackers[bits - 1](packed, count, lowest, codes);
}

}  // namespace
}  // namespace halfbin::HALFBIN_TARGET

namespace halfbin {

const PackingKernels HALFBIN_PACKING_KERNELS = {HALFBIN_TARGET::PackKernel, HALFBIN_TARGET::UnpackKernel};

}  // namespace halfbin
