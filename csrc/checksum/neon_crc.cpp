// CRC-32 by the instructions that ARMv8.1 has for this very polynomial.
#include <arm_acle.h>

#include <cstring>

#include "checksum/crc32.h"

namespace halfbin {

uint32_t Crc32Neon(uint32_t crc, const uint8_t* bytes, size_t size) {
  for (; size >= 8; bytes += 8, size -= 8) {
    uint64_t word;
    std::memcpy(&word, bytes, 8);
    crc = __crc32d(crc, word);
  }
  for (; size > 0; ++bytes, --size) crc = __crc32b(crc, *bytes);
  return crc;
}

}  // namespace halfbin
