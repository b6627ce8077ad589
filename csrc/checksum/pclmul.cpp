// CRC-32 by products without carry. What was read so far is kept as 128 bits with the same remainder: followed by n bits it is
// worth (its first half) * x^(n + 64) + (its second half) * x^n, and both powers may be taken modulo the polynomial. Four such
// sums run side by side, as a product takes a few cycles. The plain loop takes the last 128 bits and what is left over.
#include <immintrin.h>

#include "checksum/crc32.h"
#include "checksum/polynomial.h"

namespace halfbin {
namespace {

// Factors that move 128 bits on by n bits. The low 64 bits of a register come first in the message. Bits being mirrored, a product
// of 64 and 32 of them lies 32 bits off its place, and one bit more, as 64 by 64 bits give 127.
template <int n>
__m128i Factors() {
  constexpr uint64_t first = static_cast<uint64_t>(PowerOfX(n + 32)) << 1, second = static_cast<uint64_t>(PowerOfX(n - 32)) << 1;
  return _mm_set_epi64x(static_cast<int64_t>(second), static_cast<int64_t>(first));
}

inline __m128i Load(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

inline __m128i MoveOn(__m128i a, __m128i factors, __m128i next) {
  const __m128i first = _mm_clmulepi64_si128(a, factors, 0x00), second = _mm_clmulepi64_si128(a, factors, 0x11);
  return _mm_xor_si128(_mm_xor_si128(first, second), next);
}

}  // namespace

uint32_t Crc32Pclmul(uint32_t crc, const uint8_t* bytes, size_t size) {
  if (size < 64) return Crc32Portable(crc, bytes, size);
  __m128i a = _mm_xor_si128(Load(bytes), _mm_cvtsi32_si128(static_cast<int32_t>(crc)));
  __m128i b = Load(bytes + 16), c = Load(bytes + 32), d = Load(bytes + 48);
  bytes += 64, size -= 64;
  for (const __m128i factors = Factors<512>(); size >= 64; bytes += 64, size -= 64) {
    a = MoveOn(a, factors, Load(bytes));
    b = MoveOn(b, factors, Load(bytes + 16));
    c = MoveOn(c, factors, Load(bytes + 32));
    d = MoveOn(d, factors, Load(bytes + 48));
  }
  const __m128i factors = Factors<128>();
  a = MoveOn(MoveOn(MoveOn(a, factors, b), factors, c), factors, d);
  for (; size >= 16; bytes += 16, size -= 16) a = MoveOn(a, factors, Load(bytes));
  uint8_t same_remainder[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(same_remainder), a);
  return Crc32Portable(Crc32Portable(0, same_remainder, 16), bytes, size);
}

}  // namespace halfbin
