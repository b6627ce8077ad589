#include "matmul/mixed.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <vector>

#include "cpu/threads.h"
#include "matmul/scalars.h"

namespace halfbin::matmul {
namespace {

constexpr size_t kColumns = 64;  // of a task: what Load takes
enum Mark : uint8_t { kCodes, kKnown, kFound };

// Marks columns first <= c < last and copies the inputs, zeros where columns are floats. Returns how many are not finite.
template <class T>
size_t Part(const Linear& linear, float threshold, size_t first, size_t last, Mark* marks, T* masked) {
  const size_t k = linear.weights.header.k, columns = last - first;
  const T* x = static_cast<const T*>(linear.x.data);
  float row[kColumns], most[kColumns] = {};
  size_t odd = 0;
  for (size_t t = 0; t < linear.m; ++t) {
    Load(linear.x, t * k + first, columns, row);
    for (size_t i = 0; i < columns; ++i) {
      const float size = std::fabs(row[i]);
      odd += !(size < INFINITY);
      most[i] = size > most[i] ? size : most[i];
    }
  }
  for (size_t i = 0; i < columns; ++i) {
    if (marks[first + i] == kCodes && most[i] >= threshold) marks[first + i] = kFound;
  }
  for (size_t t = 0; t < linear.m; ++t) {
    for (size_t c = first; c < last; ++c) masked[t * k + c] = marks[c] == kCodes ? x[t * k + c] : T{0};
  }
  return odd;
}

float ScaleAt(const uint8_t* scales, Float type, size_t r) {
  if (type == Float::kFloat32) return reinterpret_cast<const float*>(scales)[r];
  const uint16_t bits = reinterpret_cast<const uint16_t*>(scales)[r];
  return type == Float::kFloat16 ? FromHalf(bits) : FromBfloat16(bits);
}

// What the codes of one column stand for, for the rows of a panel.
void Values(const Weights& w, size_t panel, size_t column, float* out) {
  const size_t group = column / w.header.group_size;
  const uint8_t* block = w.panels + panel * w.panel_bytes + group * w.block_bytes;
  uint8_t codes[kPanelRows];
  ColumnOfCodes(w, block, column - group * w.header.group_size, codes);
  for (size_t r = 0; r < kPanelRows; ++r) {
    const int32_t zero = w.header.has_zeros ? block[w.zeros_at + r] : w.header.zero;
    out[r] = ScaleAt(block + w.code_bytes, w.header.scale_type, r) * static_cast<float>(codes[r] - zero);
  }
}

float InputAt(const Tensor& x, size_t at) {
  float value;
  Load(x, at, 1, &value);
  return value;
}

// The float columns, the bias and the rounding, for the rows of a panel.
void FinishPanel(const Linear& linear, const FloatColumns& columns, const std::vector<size_t>& found, size_t panel, float* sums) {
  const size_t n = linear.weights.header.n, k = linear.weights.header.k;
  const size_t first = panel * kPanelRows, rows = std::min(kPanelRows, n - first);
  alignas(64) float values[kPanelRows] = {};
  const auto add = [&](size_t column) {
    for (size_t t = 0; t < linear.m; ++t) {
      const float x = InputAt(linear.x, t * k + column);
      float* y = sums + t * n + first;
      for (size_t r = 0; r < rows; ++r) y[r] += x * values[r];
    }
  };
  for (size_t i = 0; i < columns.count; ++i) {
    Load(columns.values, i * n + first, rows, values);
    add(static_cast<size_t>(columns.ids[i]));
  }
  for (const size_t column : found) {
    Values(linear.weights, panel, column, values);
    add(column);
  }
  alignas(64) float bias[kPanelRows] = {};
  if (linear.bias.data != nullptr) Load(linear.bias, first, rows, bias);
  for (size_t t = 0; t < linear.m; ++t) {
    const size_t at = t * n + first;
    for (size_t r = 0; r < rows; ++r) {
      const float y = sums[at + r] + bias[r];
      if (linear.y_type == Float::kFloat32) {
        static_cast<float*>(linear.y)[at + r] = y;
      } else {
        static_cast<uint16_t*>(linear.y)[at + r] = ToBfloat16(y);
      }
    }
  }
}

}  // namespace

size_t RunMixed(const Linear& linear, const FloatColumns& columns, const InstructionSet& set, size_t num_threads) {
  const size_t k = linear.weights.header.k, n = linear.weights.header.n, bytes = linear.x.type == Float::kFloat32 ? 4 : 2;
  if (linear.m == 0 || n == 0) return 0;
  std::vector<Mark> marks(k, kCodes);
  for (size_t i = 0; i < columns.count; ++i) marks[static_cast<size_t>(columns.ids[i])] = kKnown;
  const auto masked = std::make_unique_for_overwrite<uint8_t[]>(linear.m * k * bytes);
  std::atomic<size_t> odd{0};
  ParallelFor(num_threads, (k + kColumns - 1) / kColumns, [&](size_t task) {
    const size_t first = task * kColumns, last = std::min(k, first + kColumns);
    const float threshold = columns.threshold;
    odd += bytes == 4 ? Part(linear, threshold, first, last, marks.data(), reinterpret_cast<float*>(masked.get()))
                      : Part(linear, threshold, first, last, marks.data(), reinterpret_cast<uint16_t*>(masked.get()));
  });
  if (odd != 0) return odd;
  std::vector<size_t> found;
  for (size_t c = 0; c < k; ++c) {
    if (marks[c] == kFound) found.push_back(c);
  }
  const bool plain = columns.count == 0 && found.empty();
  if (plain) return Run(linear, set, num_threads);
  const auto sums = std::make_unique_for_overwrite<float[]>(linear.m * n);
  Linear rest = linear;
  rest.x.data = masked.get(), rest.bias.data = nullptr, rest.y = sums.get(), rest.y_type = Float::kFloat32;
  Run(rest, set, num_threads);
  ParallelFor(num_threads, linear.weights.num_panels,
              [&](size_t panel) { FinishPanel(linear, columns, found, panel, sums.get()); });
  return 0;
}

}  // namespace halfbin::matmul
