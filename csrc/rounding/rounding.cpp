// Which loops, and how rows are cut into tasks: a task is a chunk of a row's tiles, or rows that make up about a chunk. Tiles of
// more elements than a chunk are gone through twice, by all threads: for their range, and then with their scale.
#include "rounding/rounding.h"

#include <atomic>
#include <cstring>
#include <vector>

#include "cpu/threads.h"

// The plain arithmetic of scales, for ranges that several threads found together.
#define HALFBIN_TARGET large_tiles
#include "rounding/scales_inl.h"

namespace halfbin {
namespace {

constexpr size_t kChunk = size_t{1} << 16;  // elements: 256 KiB of float32, worked on group by group

size_t ElementBytes(Element element) { return element == Element::kFloat32 ? 4 : 2; }

const uint8_t* At(const Rows& rows, size_t row, size_t column) {
  return static_cast<const uint8_t*>(rows.x) + (row * rows.n + column) * ElementBytes(rows.element);
}

size_t NumTiles(const Rows& rows) { return (rows.n + rows.size - 1) / rows.size; }

// Whole tiles, and eight of them or a multiple, so that packed codes begin at whole bytes.
struct Tasks {
  explicit Tasks(const Rows& rows) {
    const size_t step = 8 * rows.size;
    width = rows.n <= kChunk ? rows.n : (kChunk + step - 1) / step * step;
    per_row = width ? (rows.n + width - 1) / width : 0;
    height = width && width < kChunk ? kChunk / width : 1;
    if (per_row > 1) height = 1;
    count = (rows.num_rows + height - 1) / height * per_row;
  }
  size_t width, per_row, height, count;
};

// Calls work(row, first column, number of columns, task) for each part of each row.
template <class Work>
void ForEachPart(const Rows& rows, size_t num_threads, const Work& work) {
  const Tasks tasks(rows);
  ParallelFor(num_threads, tasks.count, [&](size_t task) {
    const size_t first = task / tasks.per_row * tasks.height, column = task % tasks.per_row * tasks.width;
    const size_t last = first + tasks.height < rows.num_rows ? first + tasks.height : rows.num_rows;
    const size_t count = rows.n - column < tasks.width ? rows.n - column : tasks.width;
    for (size_t row = first; row < last; ++row) work(row, column, count, task);
  });
}

// Whether a tile is more than a task.
bool AreLarge(const Rows& rows) { return rows.size > kChunk && rows.n > kChunk; }

void Add(ErrorSums& sums, const ErrorSums& more) {
  sums.signal += more.signal;
  sums.noise += more.noise;
  if (!(more.max_abs <= sums.max_abs)) sums.max_abs = more.max_abs;  // NaN too
}

// Those of all tasks, in their order, whoever worked on them.
ErrorSums Together(const std::vector<ErrorSums>& of_tasks) {
  ErrorSums whole;
  for (const ErrorSums& sums : of_tasks) Add(whole, sums);
  return whole;
}

// Where a row of packed codes ends with the column before `end`, what its bytes hold beyond them is 0.
void FillUp(const CodesOut& out, size_t row, size_t n, size_t end) {
  if (end != n) return;
  const size_t filled = PackedSize(n, out.bits);
  std::memset(out.bytes + row * out.row_bytes + filled, 0, out.row_bytes - filled);
}

// The codes of one part: where they go at once, or to be packed.
class Part {
 public:
  Part(const PackingKernels& packing, const CodesOut& out, size_t row, size_t n, size_t column, size_t count)
      : packing_(packing), out_(out), count_(count) {
    if (out.bits == 0) {
      codes_ = out.bytes + row * n + column;
      return;
    }
    packed_ = out.bytes + row * out.row_bytes + PackedSize(column, out.bits);
    FillUp(out, row, n, column + count);
    thread_local std::vector<uint8_t> buffer;
    if (buffer.size() < count) buffer.resize(count);
    codes_ = buffer.data();
  }
  uint8_t* codes() const { return codes_; }
  void Finish() const {
    if (packed_) packing_.pack(codes_, count_, out_.bits, out_.lowest, packed_);
  }

 private:
  const PackingKernels& packing_;
  const CodesOut& out_;
  size_t count_;
  uint8_t* codes_ = nullptr;
  uint8_t* packed_ = nullptr;
};

Range RangeOfTile(const RoundingKernels& kernels, const Rows& rows, size_t row, size_t start, size_t count,
                  size_t num_threads) {
  const size_t num_chunks = (count + kChunk - 1) / kChunk;
  std::vector<Range> found(num_chunks);
  ParallelFor(num_threads, num_chunks, [&](size_t i) {
    const size_t length = count - i * kChunk < kChunk ? count - i * kChunk : kChunk;
    found[i] = kernels.range(At(rows, row, start + i * kChunk), rows.element, length);
  });
  Range whole{0, 0, true};
  for (const Range& range : found) {
    whole.finite &= range.finite;
    if (range.least < whole.least) whole.least = range.least;
    if (range.greatest > whole.greatest) whole.greatest = range.greatest;
  }
  return whole;
}

// One tile with its scale; chunks are multiples of eight codes, so packed ones share no byte.
void RoundTile(const RoundingKernels& kernels, const Rows& rows, const CodeFormat& format, size_t row, size_t start,
               size_t count, float scale, int32_t zero, const CodesOut& codes, size_t num_threads) {
  ParallelFor(num_threads, (count + kChunk - 1) / kChunk, [&](size_t i) {
    const size_t column = start + i * kChunk, left = count - i * kChunk, length = left < kChunk ? left : kChunk;
    const Part part(*kernels.packing, codes, row, rows.n, column, length);
    kernels.round({At(rows, row, column), rows.element, length, length, &format}, &scale, &zero, part.codes());
    part.Finish();
  });
}

}  // namespace

const RoundingKernels* RoundingKernelsOf(const char* instruction_set) {
  if (std::strcmp(instruction_set, "portable") == 0) return &kRoundingPortable;
#if defined(__x86_64__)
  if (std::strcmp(instruction_set, "avx2") == 0) return &kRoundingAvx2;
  if (std::strcmp(instruction_set, "avx512") == 0) return &kRoundingAvx512;
#endif
  return nullptr;
}

bool FitAndRound(const RoundingKernels& kernels, const Rows& rows, const CodeFormat& format, const ScaleRule& rule,
                 const CodesOut& codes, void* scale, int32_t* zero, size_t num_threads, ErrorSums* sums) {
  const size_t num_tiles = NumTiles(rows), scale_bytes = large_tiles::ScaleBytes(rule.stored);
  // Where tiles are larger than a chunk and codes are packed, a tile must begin at a whole byte.
  if (sums == nullptr && AreLarge(rows) && (codes.bits == 0 || rows.size % 8 == 0 || num_tiles == 1)) {
    for (size_t row = 0; row < rows.num_rows; ++row) {
      for (size_t tile = 0; tile < num_tiles; ++tile) {
        const size_t start = tile * rows.size, count = rows.n - start < rows.size ? rows.n - start : rows.size;
        const Range range = RangeOfTile(kernels, rows, row, start, count, num_threads);
        if (!range.finite) return false;
        const auto params = large_tiles::ParamsOf(range.least, range.greatest, rule, format.qmin, format.qmax);
        large_tiles::Put(params, rule.stored, scale, row * num_tiles + tile);
        if (rule.covers == Covers::kRange) zero[row * num_tiles + tile] = params.zero;
        RoundTile(kernels, rows, format, row, start, count, params.scale, params.zero, codes, num_threads);
      }
    }
    return true;
  }
  std::atomic<bool> finite{true};
  std::vector<ErrorSums> found(sums ? Tasks(rows).count : 0);
  const bool in_nibbles = kernels.fit_and_pack && codes.bits == 4 && (rows.size % 2 == 0 || num_tiles == 1);
  ForEachPart(rows, num_threads, [&](size_t row, size_t column, size_t count, size_t task) {
    if (!finite.load(std::memory_order_relaxed)) return;
    const size_t tile = row * num_tiles + column / rows.size;
    void* const scales = static_cast<uint8_t*>(scale) + tile * scale_bytes;
    int32_t* const zeros = zero ? zero + tile : nullptr;
    const Run run{At(rows, row, column), rows.element, count, rows.size, &format};
    ErrorSums part_sums, *const wanted = sums ? &part_sums : nullptr;
    bool done;
    if (in_nibbles) {
      FillUp(codes, row, rows.n, column + count);
      uint8_t* const nibbles = codes.bytes + row * codes.row_bytes + column / 2;
      done = kernels.fit_and_pack(run, rule, codes.lowest, nibbles, scales, zeros, wanted);
    } else {
      const Part part(*kernels.packing, codes, row, rows.n, column, count);
      done = kernels.fit_and_round(run, rule, part.codes(), scales, zeros, wanted);
      if (done) part.Finish();
    }
    if (!done) finite.store(false, std::memory_order_relaxed);
    if (sums) Add(found[task], part_sums);
  });
  if (sums) *sums = Together(found);
  return finite.load();
}

void RoundWith(const RoundingKernels& kernels, const Rows& rows, const CodeFormat& format, const float* scale,
               const int32_t* zero, uint8_t* codes, size_t num_threads) {
  const size_t num_tiles = NumTiles(rows);
  if (AreLarge(rows)) {
    const CodesOut out{codes, 0, 0, rows.n};
    for (size_t row = 0; row < rows.num_rows; ++row) {
      for (size_t tile = 0; tile < num_tiles; ++tile) {
        const size_t start = tile * rows.size, count = rows.n - start < rows.size ? rows.n - start : rows.size;
        const size_t index = row * num_tiles + tile;
        RoundTile(kernels, rows, format, row, start, count, scale[index], zero ? zero[index] : 0, out, num_threads);
      }
    }
    return;
  }
  ForEachPart(rows, num_threads, [&](size_t row, size_t column, size_t count, size_t) {
    const size_t tile = row * num_tiles + column / rows.size;
    kernels.round({At(rows, row, column), rows.element, count, rows.size, &format}, scale + tile,
                  zero ? zero + tile : nullptr, codes + row * rows.n + column);
  });
}

ErrorSums Compare(const RoundingKernels& kernels, const Rows& rows, const CodeFormat& format, const uint8_t* codes,
                  const float* scale, const int32_t* zero, size_t num_threads) {
  const size_t num_tiles = NumTiles(rows);
  std::vector<ErrorSums> found(Tasks(rows).count);
  ForEachPart(rows, num_threads, [&](size_t row, size_t column, size_t count, size_t task) {
    const size_t tile = row * num_tiles + column / rows.size;
    const Run run{At(rows, row, column), rows.element, count, rows.size, &format};
    Add(found[task], kernels.compare(run, codes + row * rows.n + column, scale + tile, zero ? zero + tile : nullptr));
  });
  return Together(found);
}

bool Search(const RoundingKernels& kernels, const Rows& rows, const CodeFormat& format, const ScaleRule& rule,
            const float* factors, size_t num_factors, float* least, float* greatest, size_t num_threads) {
  const size_t num_tiles = NumTiles(rows);
  std::atomic<bool> finite{true};
  ForEachPart(rows, num_threads, [&](size_t row, size_t column, size_t count, size_t) {
    const size_t tile = row * num_tiles + column / rows.size;
    const Run run{At(rows, row, column), rows.element, count, rows.size, &format};
    if (!kernels.search(run, rule, factors, num_factors, least + tile, greatest + tile)) {
      finite.store(false, std::memory_order_relaxed);
    }
  });
  return finite.load();
}

}  // namespace halfbin
