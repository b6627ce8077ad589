// CRC-32 as zlib, gzip and PNG have it: polynomial 0x04c11db7, bits of a byte from the least significant one on, start and end
// inverted. Every form gives the same value.
#pragma once

#include <cstddef>
#include <cstdint>

namespace halfbin {

// The remainder, not inverted, behind `size` more bytes at any alignment; `crc` is that of the bytes before, 0 before the first
// of a message that is not inverted at its start.
using Crc32Kernel = uint32_t (*)(uint32_t crc, const uint8_t* bytes, size_t size);

uint32_t Crc32Portable(uint32_t crc, const uint8_t* bytes, size_t size);
#if defined(__x86_64__)
uint32_t Crc32Pclmul(uint32_t crc, const uint8_t* bytes, size_t size);  // PCLMULQDQ and SSE4.1
#elif defined(__aarch64__)
uint32_t Crc32Neon(uint32_t crc, const uint8_t* bytes, size_t size);  // ARMv8's CRC-32 instructions
#endif

// "portable", "pclmul" or "neon_crc"; nullptr where this build has no such form. The processor is not asked.
Crc32Kernel Crc32Of(const char* instruction_set);

// zlib's crc32(before, bytes): `before` is the value of the bytes that came earlier, 0 for none.
inline uint32_t Crc32(Crc32Kernel kernel, uint32_t before, const uint8_t* bytes, size_t size) {
  return ~kernel(~before, bytes, size);
}

}  // namespace halfbin
