// Rows are packed and unpacked in shares, long ones in parts that begin at whole bytes.
#include "packing/bits.h"

#include <atomic>
#include <cstring>

#include "cpu/threads.h"

namespace halfbin {
namespace {

constexpr size_t kPart = size_t{1} << 16;  // codes

// Calls work(row, first code, number of codes) for every part of every row.
template <class Work>
void ForEachPart(size_t num_rows, size_t count, size_t num_threads, const Work& work) {
  const size_t per_row = (count + kPart - 1) / kPart;
  const size_t height = count && count < kPart ? kPart / count : 1;
  if (per_row == 0) return;
  ParallelFor(num_threads, (num_rows + height - 1) / height * per_row, [&](size_t task) {
    const size_t first = task / per_row * height, start = task % per_row * kPart;
    const size_t last = first + height < num_rows ? first + height : num_rows;
    for (size_t row = first; row < last; ++row) work(row, start, count - start < kPart ? count - start : kPart);
  });
}

}  // namespace

const PackingKernels* PackingKernelsOf(const char* instruction_set) {
  if (std::strcmp(instruction_set, "portable") == 0) return &kPackingPortable;
#if defined(__x86_64__)
  if (std::strcmp(instruction_set, "avx2") == 0) return &kPackingAvx2;
  if (std::strcmp(instruction_set, "avx512") == 0) return &kPackingAvx512;
#endif
  return nullptr;
}

bool PackRows(const PackingKernels& kernels, const uint8_t* codes, size_t num_rows, size_t count, int bits, uint8_t lowest,
              uint8_t* packed, size_t row_bytes, size_t num_threads) {
  std::atomic<bool> fits{true};
  ForEachPart(num_rows, count, num_threads, [&](size_t row, size_t start, size_t length) {
    uint8_t* const to = packed + row * row_bytes + PackedSize(start, bits);
    if (!kernels.pack(codes + row * count + start, length, bits, lowest, to)) fits.store(false, std::memory_order_relaxed);
    if (start + length == count) {
      const size_t filled = PackedSize(count, bits);
      std::memset(packed + row * row_bytes + filled, 0, row_bytes - filled);
    }
  });
  return fits.load();
}

void UnpackRows(const PackingKernels& kernels, const uint8_t* packed, size_t row_bytes, size_t num_rows, size_t count,
                int bits, uint8_t lowest, uint8_t* codes, size_t num_threads) {
  ForEachPart(num_rows, count, num_threads, [&](size_t row, size_t start, size_t length) {
    const uint8_t* const from = packed + row * row_bytes + PackedSize(start, bits);
    kernels.unpack(from, length, bits, lowest, codes + row * count + start);
  });
}

}  // namespace halfbin
