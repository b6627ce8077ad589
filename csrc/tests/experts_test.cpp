// Experts in one call against each expert's own product, to the bit: every instruction set, on one thread and on two, and the choice of
// sets by the number of tokens. linear_test.cpp holds the single product against sums in double precision.
//
//   experts_test
//
// Memory of each size is allocated exactly, so that a read or write past its end is seen. Prints what differs; exit code 1 then.
#include "matmul/experts.h"

#include <array>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

namespace {

using namespace halfbin::matmul;

constexpr InputGrid kGrid{InputGrid::Scales::kTokenAndGroup, true, -127, 127, 0, 0};

std::mt19937 generator(1);

int32_t Random(int32_t low, int32_t high) { return std::uniform_int_distribution<int32_t>(low, high)(generator); }

struct Free {
  void operator()(uint8_t* memory) const { operator delete(memory, std::align_val_t(64)); }
};
using Memory = std::unique_ptr<uint8_t, Free>;

Memory New(size_t bytes) { return Memory(static_cast<uint8_t*>(operator new(bytes, std::align_val_t(64)))); }

struct Problem {
  size_t n, k, count, m, slots, stride;
  Memory packed;
  std::vector<float> x, bias;
  std::vector<int64_t> chosen;

  Problem(size_t rows, size_t columns, size_t group_size, uint32_t bits, size_t experts, size_t tokens, size_t of_each, bool one_expert)
      : n(rows), k(columns), count(experts), m(tokens), slots(of_each) {
    const Header header{kMagic, bits, n, k, group_size, Float::kFloat32, 0, 0, 1 << (bits - 1), {}};
    const size_t groups = (k + group_size - 1) / group_size;
    stride = View(header, nullptr).bytes;
    packed = New(count * stride);
    for (size_t e = 0; e < count; ++e) {
      std::vector<uint8_t> codes(n * k);
      std::vector<float> scales(n * groups);
      for (uint8_t& code : codes) code = static_cast<uint8_t>(Random(0, (1 << bits) - 1));
      for (float& scale : scales) scale = static_cast<float>(Random(1, 255)) * 0x1p-12f;
      Pack(header, {codes.data(), 0, scales.data(), nullptr}, packed.get() + e * stride, 1);
    }
    for (size_t i = 0; i < m * k; ++i) x.push_back(static_cast<float>(Random(-1000, 1000)) * 1e-3f);
    for (size_t i = 0; i < count * n; ++i) bias.push_back(static_cast<float>(Random(-100, 100)) * 0.01f);
    for (size_t i = 0; i < m * slots; ++i) chosen.push_back(one_expert ? 0 : Random(0, static_cast<int32_t>(count) - 1));
  }

  Experts Call(float* y) const {
    const Float type = Float::kFloat32;
    return {packed.get(), count, stride, {x.data(), type}, m, chosen.data(), slots, kGrid, {bias.data(), type}, y, type};
  }

  std::vector<float> OneByOne() const {
    std::vector<float> y(m * slots * n);
    for (size_t i = 0; i < m * slots; ++i) {
      const size_t e = static_cast<size_t>(chosen[i]);
      const uint8_t* buffer = packed.get() + e * stride;
      Run({View(*reinterpret_cast<const Header*>(buffer), buffer), {&x[i / slots * k], Float::kFloat32}, 1, kGrid,
           {&bias[e * n], Float::kFloat32}, &y[i * n], Float::kFloat32},
          *Find("portable", 1), 1);
    }
    return y;
  }
};

bool Check(const Problem& p, const char* set, size_t num_threads, const std::vector<float>& expected) {
  std::vector<float> y(expected.size());
  RunExperts(p.Call(y.data()), set, num_threads);
  for (size_t i = 0; i < y.size(); ++i) {
    if (std::memcmp(&y[i], &expected[i], 4) == 0) continue;
    std::printf("%s, %zu threads, %zu experts of %zu x %zu, %zu tokens of %zu slots: [%zu, %zu] is %.9g, not %.9g\n",
                set == nullptr ? "what is chosen" : set, num_threads, p.count, p.n, p.k, p.m, p.slots, i / p.n, i % p.n, y[i],
                expected[i]);
    return false;
  }
  return true;
}

bool RefusesUnknown(Problem& p) {
  bool right = FirstUnknown(p.Call(nullptr)) == -1;
  for (const int64_t bad : {int64_t{-1}, static_cast<int64_t>(p.count), INT64_MIN, INT64_MAX}) {
    const int64_t before = p.chosen.back();
    p.chosen.back() = bad;
    right = right && FirstUnknown(p.Call(nullptr)) == static_cast<int64_t>(p.chosen.size()) - 1;
    p.chosen.back() = before;
  }
  if (!right) std::printf("an expert that there is not went unseen\n");
  return right;
}

}  // namespace

int main() {
  int wrong = 0, cases = 0;
  for (const auto& [n, k, group_size] : {std::array<size_t, 3>{1, 1, 32}, {70, 96, 32}, {65, 129, 64}, {130, 260, 128}, {193, 64, 64}}) {
    for (const uint32_t bits : {2u, 4u, 8u}) {
      for (const auto& [count, m, slots] : {std::array<size_t, 3>{1, 1, 1}, {8, 1, 2}, {3, 2, 3}, {4, 9, 2}, {3, 60, 2}}) {
        for (const bool one_expert : {false, true}) {
          Problem p(n, k, group_size, bits, count, m, slots, one_expert);
          const std::vector<float> expected = p.OneByOne();
          bool right = RefusesUnknown(p);
          for (const size_t num_threads : {1, 2}) {
            for (const std::string& set : InstructionSets()) right = Check(p, set.c_str(), num_threads, expected) && right;
            right = Check(p, nullptr, num_threads, expected) && right;
          }
          ++cases, wrong += !right;
        }
      }
    }
  }
  std::printf("%d cases, %d wrong\n", cases, wrong);
  return wrong != 0;
}
