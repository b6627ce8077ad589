// HQQ's alternation on every instruction set that this processor runs: no tile is worse, in the norm that is minimised, than where it
// started; the plain loops' bits, on one thread and on three. Prints what differs; exit code 1 then.
#include "hqq/solve.h"

#include "sets.h"

namespace {

using namespace halfbin;
using tests::Hostile;
using tests::Same;

constexpr HqqSchedule kSchedule{6, 0.7f, 2.5, 1.01};

struct Found {
  std::vector<float> scale;
  std::vector<int32_t> zero;
};

struct Case {
  size_t num_tiles, count;
  bool zeros;
  CodeFormat format;
};

Found Solve(const char* set, const std::vector<float>& x, const Case& c, Found start, size_t num_threads) {
  const HqqTiles tiles{x.data(), c.num_tiles, c.count, start.scale.data(), c.zeros ? start.zero.data() : nullptr};
  SolveHqq(SolveHqqOf(set), tiles, c.format, ScaleType::kFloat32, kSchedule, num_threads);
  return start;
}

// The sum of |error|^p of a tile of integers, in steps of its first scale.
double Norm(const float* x, const Case& c, float scale, int zero, float unit) {
  double sum = 0;
  for (size_t i = 0; i < c.count; ++i) {
    const float steps = std::min(std::max(x[i] / scale, -131072.0f), 131072.0f);
    const int code = std::min(std::max(static_cast<int>(std::nearbyint(steps)) + zero, c.format.qmin), c.format.qmax);
    sum += std::pow(std::abs(static_cast<double>(x[i]) - static_cast<double>(code - zero) * scale) / unit, 0.7);
  }
  return sum;
}

int Wrong(const char* set, const Case& c, uint32_t seed) {
  std::vector<float> x = Hostile(c.num_tiles * c.count, seed);
  std::fill(x.begin(), x.begin() + static_cast<std::ptrdiff_t>(c.count), 0.0f);  // a tile of zeros
  const float widest = c.format.kind == CodeKind::kTable ? 1 : static_cast<float>(c.format.qmax);
  Found start;
  for (size_t tile = 0; tile < c.num_tiles; ++tile) {
    float largest = 0;
    for (size_t i = 0; i < c.count; ++i) largest = std::max(largest, std::abs(x[tile * c.count + i]));
    start.scale.push_back(largest > 0 ? std::max(largest / widest, 0x1p-126f) : 1.0f);
    start.zero.push_back(static_cast<int32_t>(tile % 5) - 2);
  }
  const Found found = Solve(set, x, c, start, 1), threads = Solve(set, x, c, start, 3), plain = Solve("portable", x, c, start, 1);
  int wrong = !Same(found.scale, plain.scale) || found.zero != plain.zero;
  wrong += !Same(found.scale, threads.scale) || found.zero != threads.zero;
  for (size_t tile = 0; tile < c.num_tiles; ++tile) {
    wrong += !(found.scale[tile] > 0) || !std::isfinite(found.scale[tile]);
    if (c.format.kind != CodeKind::kIntegers) continue;
    const float* const numbers = x.data() + tile * c.count;
    const int zero = c.zeros ? found.zero[tile] : 0, first_zero = c.zeros ? start.zero[tile] : 0;
    wrong += c.zeros && (zero < c.format.qmin || zero > c.format.qmax);
    const double best = Norm(numbers, c, found.scale[tile], zero, start.scale[tile]);
    const double first = Norm(numbers, c, start.scale[tile], first_zero, start.scale[tile]);
    // Of powers, and for each element the float32 rounding of an error, up to 32 steps of it, where this sum has 0.
    wrong += !(best <= first * (1 + 0x1p-18) + static_cast<double>(c.count) * std::pow(64 * 0x1p-23, 0.7));
  }
  if (wrong) std::printf("%zu tiles of %zu: %d wrong\n", c.num_tiles, c.count, wrong);
  return wrong;
}

int WrongWith(const char* set) {
  CodeFormat integers, table;
  integers.qmin = -8;
  integers.qmax = 7;
  table.kind = CodeKind::kTable;
  const float values[] = {-1, -0.4f, 0, 0.4f, 1}, boundaries[] = {-0.7f, -0.2f, 0.2f, 0.7f};
  std::copy(std::begin(values), std::end(values), table.values);
  std::copy(std::begin(boundaries), std::end(boundaries), table.boundaries);
  table.num_boundaries = 4;
  int wrong = 0;
  uint32_t seed = 0;
  for (const size_t count : {1, 15, 16, 17, 63, 64, 65, 100, 128, 5000}) {
    const size_t num_tiles = count < 5000 ? 4 : 1;
    wrong += Wrong(set, {num_tiles, count, false, integers}, ++seed);
    wrong += Wrong(set, {num_tiles, count, true, integers}, ++seed);
    wrong += Wrong(set, {num_tiles, count, false, table}, ++seed);
  }
  return wrong + Wrong(set, {5, 8000, true, integers}, ++seed);  // several tasks
}

}  // namespace

int main() { return halfbin::tests::OnEverySet(WrongWith); }
