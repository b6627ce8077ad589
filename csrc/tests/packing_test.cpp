// Packing on every instruction set that this processor runs, against one bit after the other. Prints what differs; exit code 1 then.
#include "packing/bits.h"

#include "sets.h"

namespace {

using namespace halfbin;

std::mt19937 generator(1);

struct Case {
  size_t num_rows, count, beyond;  // bytes behind the codes of a row
  int bits, lowest;
  size_t num_threads;
};

int Wrong(const PackingKernels& kernels, const Case& c) {
  const size_t row_bytes = PackedSize(c.count, c.bits) + c.beyond;
  std::vector<uint8_t> codes(c.num_rows * c.count), packed(c.num_rows * row_bytes, 0xaa), expected(packed.size(), 0), back(codes.size());
  for (uint8_t& code : codes) code = static_cast<uint8_t>(static_cast<int>(generator() % (1u << c.bits)) + c.lowest);
  for (size_t i = 0; i < codes.size(); ++i) {
    const uint32_t counted = static_cast<uint8_t>(codes[i] - c.lowest);
    for (int bit = 0; bit < c.bits; ++bit) {
      const size_t at = (i % c.count) * static_cast<size_t>(c.bits) + static_cast<size_t>(bit);
      expected[i / c.count * row_bytes + at / 8] |= static_cast<uint8_t>((counted >> bit & 1u) << at % 8);
    }
  }
  const uint8_t lowest = static_cast<uint8_t>(c.lowest);
  int wrong = !PackRows(kernels, codes.data(), c.num_rows, c.count, c.bits, lowest, packed.data(), row_bytes, c.num_threads);
  wrong += packed != expected;
  UnpackRows(kernels, packed.data(), row_bytes, c.num_rows, c.count, c.bits, lowest, back.data(), c.num_threads);
  wrong += back != codes;
  if (c.bits < 8) {  // a code that does not fit, anywhere
    codes[generator() % codes.size()] = static_cast<uint8_t>(c.lowest + (1 << c.bits));
    wrong += PackRows(kernels, codes.data(), c.num_rows, c.count, c.bits, lowest, packed.data(), row_bytes, c.num_threads);
  }
  if (wrong) std::printf("%zu x %zu codes of %d bits from %d on: wrong\n", c.num_rows, c.count, c.bits, c.lowest);
  return wrong;
}

int WrongWith(const char* set) {
  const PackingKernels& kernels = *PackingKernelsOf(set);
  int wrong = 0;
  for (int bits = 1; bits <= 8; ++bits) {
    for (const int lowest : {0, -(1 << (bits - 1))}) {
      for (size_t count = 1; count < 300; count += count < 40 ? 1 : 13) wrong += Wrong(kernels, {3, count, count % 4, bits, lowest, 1});
      wrong += Wrong(kernels, {2, 70'001, 3, bits, lowest, 3});  // rows in two parts
      wrong += Wrong(kernels, {1000, 77, 0, bits, lowest, 3});   // several rows in a task
    }
  }
  return wrong;
}

}  // namespace

int main() { return halfbin::tests::OnEverySet(WrongWith); }
