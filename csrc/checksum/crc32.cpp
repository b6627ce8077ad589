#include "checksum/crc32.h"

#include <array>
#include <cstring>

#include "checksum/polynomial.h"

namespace halfbin {
namespace {

// kTables[i][b]: the remainder of byte b followed by i bytes of 0.
constexpr std::array<std::array<uint32_t, 256>, 8> Tables() {
  std::array<std::array<uint32_t, 256>, 8> tables{};
  for (uint32_t b = 0; b < 256; ++b) {
    uint32_t a = b;
    for (auto& table : tables) {
      for (int bit = 0; bit < 8; ++bit) a = TimesX(a);
      table[b] = a;
    }
  }
  return tables;
}

constexpr auto kTables = Tables();

uint32_t LittleEndian(const uint8_t* p) {
  return static_cast<uint32_t>(p[0]) | static_cast<uint32_t>(p[1]) << 8 | static_cast<uint32_t>(p[2]) << 16 |
         static_cast<uint32_t>(p[3]) << 24;
}

}  // namespace

uint32_t Crc32Portable(uint32_t crc, const uint8_t* bytes, size_t size) {
  for (; size >= 8; bytes += 8, size -= 8) {
    const uint32_t low = crc ^ LittleEndian(bytes), high = LittleEndian(bytes + 4);
    crc = kTables[7][low & 255] ^ kTables[6][low >> 8 & 255] ^ kTables[5][low >> 16 & 255] ^ kTables[4][low >> 24] ^
          kTables[3][high & 255] ^ kTables[2][high >> 8 & 255] ^ kTables[1][high >> 16 & 255] ^ kTables[0][high >> 24];
  }
  for (; size > 0; ++bytes, --size) crc = crc >> 8 ^ kTables[0][(crc ^ *bytes) & 255];
  return crc;
}

Crc32Kernel Crc32Of(const char* instruction_set) {
  if (std::strcmp(instruction_set, "portable") == 0) return Crc32Portable;
#if defined(__x86_64__)
  if (std::strcmp(instruction_set, "pclmul") == 0) return Crc32Pclmul;
#elif defined(__aarch64__)
  if (std::strcmp(instruction_set, "neon_crc") == 0) return Crc32Neon;
#endif
  return nullptr;
}

}  // namespace halfbin
