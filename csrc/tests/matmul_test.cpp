// Every instruction set that this processor runs against plain sums, to the bit, without Python: for sanitizers and valgrind.
// Memory of each size is allocated exactly, so that a read or write past its end is seen. Prints what differs; exit code 1 then.
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "matmul/mixed.h"

namespace {

using namespace halfbin::matmul;

struct Case {
  size_t n, k, m, group_size;
  uint32_t bits;
  bool zeros, by_group, x_zeros;
};

std::mt19937 generator(1);

int32_t Random(int32_t low, int32_t high) { return std::uniform_int_distribution<int32_t>(low, high)(generator); }

struct Problem {
  Case c;
  size_t groups;
  std::vector<uint8_t> codes;
  std::vector<float> scales, x, bias;
  std::vector<int32_t> zero_points;
  InputGrid grid;

  explicit Problem(const Case& of) : c(of), groups((of.k + of.group_size - 1) / of.group_size) {
    const int32_t top = (1 << c.bits) - 1;
    for (size_t i = 0; i < c.n * c.k; ++i) codes.push_back(static_cast<uint8_t>(Random(0, top)));
    for (size_t i = 0; i < c.n * groups; ++i) {
      scales.push_back(static_cast<float>(Random(1, 1000)) * 1e-4f);
      zero_points.push_back(Random(0, top));
    }
    for (size_t i = 0; i < c.m * c.k; ++i) x.push_back(static_cast<float>(Random(-127, 127)));
    for (size_t i = 0; i < c.n; ++i) bias.push_back(static_cast<float>(Random(-100, 100)) * 0.01f);
    using Scales = InputGrid::Scales;
    // A static scale of 1 leaves the numbers as they are, and so does one by group or token where 127 is among them.
    grid = {c.by_group ? Scales::kTokenAndGroup : Scales::kStatic, !c.x_zeros, -128, 127, 1.0f, c.x_zeros ? 1 : 0};
    if (c.x_zeros) {
      for (float& v : x) v = v > 126.0f ? 126.0f : v;
    }
    if (c.by_group) {
      for (size_t t = 0; t < c.m; ++t) {
        for (size_t g = 0; g < groups; ++g) x[t * c.k + g * c.group_size] = 127.0f;
      }
    }
  }

  float Expected(size_t t, size_t r) const {
    float y = 0;
    for (size_t g = 0; g < groups; ++g) {
      int64_t total = 0;
      const int32_t zero = c.zeros ? zero_points[r * groups + g] : 1 << (c.bits - 1);
      for (size_t j = g * c.group_size; j < c.k && j < (g + 1) * c.group_size; ++j) {
        total += (codes[r * c.k + j] - zero) * static_cast<int64_t>(x[t * c.k + j]);
      }
      y = std::fma(static_cast<float>(total) * scales[r * groups + g], 1.0f, y);
    }
    return y + bias[r];
  }
};

bool Check(const Case& c, const InstructionSet& set, size_t num_threads) {
  const Problem p(c);
  const Header header{kMagic, c.bits, c.n, c.k, c.group_size, Float::kFloat32, c.zeros, c.x_zeros, 1 << (c.bits - 1), {}};
  const size_t bytes = View(header, nullptr).bytes;
  struct Free {
    void operator()(uint8_t* memory) const { operator delete(memory, std::align_val_t(64)); }
  };
  const std::unique_ptr<uint8_t, Free> packed(static_cast<uint8_t*>(operator new(bytes, std::align_val_t(64))));
  Pack(header, {p.codes.data(), 0, p.scales.data(), c.zeros ? p.zero_points.data() : nullptr}, packed.get(), num_threads);
  std::vector<uint8_t> codes(p.codes.size());
  std::vector<float> scales(p.scales.size()), y(c.m * c.n);
  std::vector<int32_t> zero_points(p.zero_points.size());
  Unpack(View(header, packed.get()), {codes.data(), 0, scales.data(), c.zeros ? zero_points.data() : nullptr}, num_threads);
  if (codes != p.codes || scales != p.scales || (c.zeros && zero_points != p.zero_points)) {
    std::printf("%zu x %zu, groups of %zu, %u bits, zeros %d: unpacked is not what was packed\n", c.n, c.k, c.group_size, c.bits,
                c.zeros);
    return false;
  }
  const Linear linear{View(header, packed.get()), {p.x.data(), Float::kFloat32}, c.m, p.grid, {p.bias.data(), Float::kFloat32},
                      y.data(), Float::kFloat32};
  Run(linear, set, num_threads);
  for (size_t t = 0; t < c.m; ++t) {
    for (size_t r = 0; r < c.n; ++r) {
      const float expected = p.Expected(t, r), found = y[t * c.n + r];
      if (std::memcmp(&expected, &found, 4) != 0 && expected != found) {
        std::printf("%s, %zu x %zu, %zu tokens, groups of %zu, %u bits, zeros %d, by group %d, input zeros %d: [%zu, %zu] is %.9g, not %.9g\n",
                    set.name, c.n, c.k, c.m, c.group_size, c.bits, c.zeros, c.by_group, c.x_zeros, t, r, found, expected);
        return false;
      }
    }
  }
  return true;
}

// Columns kept and columns found, all inputs of which are whole numbers of at most 127, so that each token's scale is 1.
bool CheckMixed(size_t n, size_t k, size_t m, const InstructionSet& set, size_t num_threads) {
  Problem p({n, k, m, k, 8, false, false, false});
  for (size_t t = 0; t < m; ++t) p.x[t * k + k / 2] = 127.0f;
  p.x[k - 1] = 1000.0f;
  const std::vector<int32_t> ids{0};
  const std::vector<float> values(p.scales.begin(), p.scales.end());
  const Header header{kMagic, 8, n, k, k, Float::kFloat32, false, false, 128, {}};
  const size_t bytes = View(header, nullptr).bytes;
  struct Free {
    void operator()(uint8_t* memory) const { operator delete(memory, std::align_val_t(64)); }
  };
  const std::unique_ptr<uint8_t, Free> packed(static_cast<uint8_t*>(operator new(bytes, std::align_val_t(64))));
  Pack(header, {p.codes.data(), 0, p.scales.data(), nullptr}, packed.get(), num_threads);
  std::vector<float> y(m * n);
  const Linear linear{View(header, packed.get()), {p.x.data(), Float::kFloat32}, m, {InputGrid::Scales::kToken, true, -128, 127, 0, 0},
                      {p.bias.data(), Float::kFloat32}, y.data(), Float::kFloat32};
  if (RunMixed(linear, {500.0f, ids.data(), {values.data(), Float::kFloat32}, 1}, set, num_threads) != 0) return false;
  for (size_t t = 0; t < m; ++t) {
    for (size_t r = 0; r < n; ++r) {
      const auto value = [&](size_t j) { return p.scales[r] * static_cast<float>(p.codes[r * k + j] - 128); };
      int64_t total = 0;
      for (size_t j = 1; j + 1 < k; ++j) total += (p.codes[r * k + j] - 128) * static_cast<int64_t>(p.x[t * k + j]);
      float expected = static_cast<float>(total) * p.scales[r];
      expected += p.x[t * k] * values[r];
      expected += p.x[t * k + k - 1] * value(k - 1);
      expected += p.bias[r];
      if (expected != y[t * n + r]) {
        std::printf("%s, mixed, %zu x %zu, %zu tokens: [%zu, %zu] is %.9g, not %.9g\n", set.name, n, k, m, t, r, y[t * n + r],
                    expected);
        return false;
      }
    }
  }
  return true;
}

}  // namespace

int main() {
  int wrong = 0, cases = 0;
  for (const std::string& name : InstructionSets()) {
    for (const auto& [n, k, m] : {std::array<size_t, 3>{1, 3, 1}, {65, 130, 4}, {70, 96, 5}, {10, 600, 17}, {129, 64, 33}}) {
      wrong += !CheckMixed(n, k, m, *Find(name.c_str(), 0), 1 + m % 2);
    }
  }
  std::printf("mixed: %d wrong\n", wrong);
  for (const std::string& name : InstructionSets()) {
    const InstructionSet& set = *Find(name.c_str(), 0);
    for (const uint32_t bits : {2u, 4u, 8u}) {
      for (const bool zeros : {false, true}) {
        for (const auto& [n, k, m] : {std::array<size_t, 3>{1, 1, 1}, {3, 7, 2}, {64, 64, 3}, {65, 130, 4}, {70, 96, 5}, {129, 320, 7},
                                      {10, 600, 17}, {66, 160, 33}, {64, 32, 300}}) {
          for (const size_t group_size : {size_t{32}, size_t{64}, size_t{128}, k}) {
            for (const int kind : {0, 1, 2}) {
              ++cases;
              wrong += !Check({n, k, m, group_size, bits, zeros, kind == 1, kind == 2}, set, 1 + cases % 2);
            }
          }
        }
      }
    }
    std::printf("%s: %d cases so far, %d wrong\n", name.c_str(), cases, wrong);
  }
  return wrong != 0;
}
