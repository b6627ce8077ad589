// Codes of 1 to 8 bits to a dense stream of bits and back: code i lies in bits [i * bits, i * bits + bits), least significant
// first. Little-endian machines.
#pragma once

#include <cstddef>
#include <cstdint>

namespace halfbin {

// Bytes that `count` codes of `bits` bits take.
inline size_t PackedSize(size_t count, int bits) { return (count * static_cast<size_t>(bits) + 7) / 8; }

// One instruction set's loops over the codes of a row.
struct PackingKernels {
  bool (*pack)(const uint8_t* codes, size_t count, int bits, uint8_t lowest, uint8_t* packed);
  void (*unpack)(const uint8_t* packed, size_t count, int bits, uint8_t lowest, uint8_t* codes);
};

extern const PackingKernels kPackingPortable;
#if defined(__x86_64__)
extern const PackingKernels kPackingAvx2, kPackingAvx512;
#endif

// "portable", "avx2" or "avx512"; nullptr where this build has no such loops. The processor is not asked.
const PackingKernels* PackingKernelsOf(const char* instruction_set);

// Packs code - lowest (bytes wrap around); the last byte is filled up with 0. Gives false where a code needs more than `bits`
// bits: its surplus bits went lost then.
//
//   codes   [num_rows, count], any alignment
//   packed  [num_rows, row_bytes], row_bytes >= PackedSize(count, bits); what lies beyond the codes becomes 0
bool PackRows(const PackingKernels& kernels, const uint8_t* codes, size_t num_rows, size_t count, int bits, uint8_t lowest,
              uint8_t* packed, size_t row_bytes, size_t num_threads);

// Undoes it: code + lowest. What fills up the rows is not looked at.
void UnpackRows(const PackingKernels& kernels, const uint8_t* packed, size_t row_bytes, size_t num_rows, size_t count,
                int bits, uint8_t lowest, uint8_t* codes, size_t num_threads);

}  // namespace halfbin
