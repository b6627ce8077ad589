// Linear layers from end to end, floats in and floats out: the plain form against sums in double precision, every other instruction set
// against the plain form to the bit, on one thread and on two. matmul_test.cpp holds sums that are exact; here inputs are rounded.
//
//   linear_test [SET...]     the instruction sets that must be found, in this order; none: whichever there are
//
// Memory of each size is allocated exactly, so that a read or write past its end is seen. Prints what differs; exit code 1 then.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "matmul/linear.h"

namespace {

using namespace halfbin::matmul;
using Scales = InputGrid::Scales;

constexpr InputGrid kGrids[] = {
    {Scales::kTokenAndGroup, true, -127, 127, 0, 0}, {Scales::kToken, true, -127, 127, 0, 0}, {Scales::kToken, false, -128, 127, 0, 0},
    {Scales::kToken, false, 0, 255, 0, 0},           {Scales::kToken, true, 0, 255, 0, 0},    {Scales::kStatic, false, -128, 127, 0.02f, 5},
    {Scales::kStatic, false, 0, 255, 0.02f, 200},
};

struct Case {
  size_t n, k, m, group_size;
  uint32_t bits;
  bool zeros;
  Float scale_type, type;  // of weights' scales; of x, bias and y
  size_t grid, first_kind;
};

std::mt19937 generator(1);

int32_t Random(int32_t low, int32_t high) { return std::uniform_int_distribution<int32_t>(low, high)(generator); }

uint32_t BitsOf(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// Floats of a type that may be narrower, as bytes, and what they are as float32. What is put in must be exact but for the last bits,
// which are cut off.
struct Floats {
  Float type;
  std::vector<uint16_t> narrow;
  std::vector<float> wide;

  const void* Data() const { return type == Float::kFloat32 ? static_cast<const void*>(wide.data()) : narrow.data(); }
  void Add(float x) {
    if (type == Float::kBfloat16) {
      const uint32_t bits = BitsOf(x) & 0xffff0000u;
      narrow.push_back(static_cast<uint16_t>(bits >> 16));
      std::memcpy(&x, &bits, 4);
    } else if (type == Float::kFloat16) {  // normal numbers
      narrow.push_back(static_cast<uint16_t>((BitsOf(x) - (112u << 23)) >> 13));
    }
    wide.push_back(x);
  }
};

// A token's numbers: what rounds in an odd way, or not at all.
float Input(size_t kind, size_t column, size_t odd_column) {
  const float usual = static_cast<float>(Random(-1000000, 1000000)) * 1e-6f;
  switch (kind) {
    case 1: return 1.75f;
    case 2: return -3.0f;
    case 3: return column % 2 == 0 ? 0.0f : -0.0f;
    case 4: return column == odd_column ? 1e30f : usual;
    case 5: return usual * 1e-38f;  // subnormal
    case 6: return column == odd_column ? std::numeric_limits<float>::quiet_NaN() : usual;
    case 7: return column == odd_column ? -std::numeric_limits<float>::infinity() : usual;
    case 8: return column == 0 ? 127.0f : static_cast<float>(Random(-253, 253)) * 0.5f;  // ties
    default: return usual;
  }
}
constexpr size_t kKinds = 9;

struct Problem {
  Case c;
  size_t groups;
  std::vector<uint8_t> codes;
  Floats scales, x, bias;
  std::vector<int32_t> zero_points;

  explicit Problem(const Case& of)
      : c(of),
        groups((of.k + of.group_size - 1) / of.group_size),
        scales{of.scale_type, {}, {}},
        x{of.type, {}, {}},
        bias{of.type, {}, {}} {
    const int32_t top = c.bits == 4 ? 15 : 255;
    for (size_t r = 0; r < c.n; ++r) {
      for (size_t j = 0; j < c.k; ++j) codes.push_back(static_cast<uint8_t>(r % 5 == 3 ? 0 : r % 5 == 4 ? top : Random(0, top)));
    }
    for (size_t i = 0; i < c.n * groups; ++i) {
      scales.Add(static_cast<float>(Random(1, 255)) * 0x1p-12f);
      zero_points.push_back(i % 7 == 5 ? 0 : i % 7 == 6 ? top : Random(0, top));
    }
    for (size_t t = 0; t < c.m; ++t) {
      const size_t odd = static_cast<size_t>(Random(0, static_cast<int32_t>(c.k) - 1));
      for (size_t j = 0; j < c.k; ++j) x.Add(Input((c.first_kind + t) % kKinds, j, odd));
    }
    for (size_t i = 0; i < c.n; ++i) bias.Add(static_cast<float>(Random(-100, 100)) * 0.01f);
  }

  bool Odd(size_t t) const {
    return std::any_of(&x.wide[t * c.k], &x.wide[t * c.k] + c.k, [](float v) { return !std::isfinite(v); });
  }
};

// y, and the bound on what float32 sums may be off. inputs.h defines scale and zero point, in float32.
struct Expected {
  double y, bound;
};

struct Step {
  float scale;
  int32_t zero_point;
};

Step StepOf(const InputGrid& grid, const float* x, size_t n) {
  if (grid.scales == Scales::kStatic) return {grid.scale, grid.zero_point};
  float least = 0, greatest = 0;
  for (size_t i = 0; i < n; ++i) least = std::min(least, x[i]), greatest = std::max(greatest, x[i]);
  const float steps = static_cast<float>(grid.qmax - grid.qmin);
  float scale = greatest / steps - least / steps;
  if (grid.symmetric) scale = (grid.qmin == 0 ? greatest : std::max(greatest, -least)) / static_cast<float>(grid.qmax);
  if (scale == 0) scale = 1;
  scale = std::max(scale, std::numeric_limits<float>::min());
  if (grid.symmetric) return {scale, 0};
  const float zero = static_cast<float>(grid.qmin) - least / scale;
  const float clipped = std::min(std::max(zero, static_cast<float>(grid.qmin)), static_cast<float>(grid.qmax));
  return {scale, static_cast<int32_t>(std::nearbyint(clipped))};
}

Expected Sum(const Problem& p, size_t t, size_t r) {
  const Case& c = p.c;
  const InputGrid& grid = kGrids[c.grid];
  const float* x = &p.x.wide[t * c.k];
  Step step = StepOf(grid, x, c.k);
  double y = 0, magnitude = 0;
  for (size_t g = 0; g < p.groups; ++g) {
    const size_t begin = g * c.group_size, end = std::min(c.k, begin + c.group_size);
    if (grid.scales == Scales::kTokenAndGroup) step = StepOf(grid, x + begin, end - begin);
    int64_t total = 0;
    for (size_t j = begin; j < end; ++j) {
      const double nearest = std::nearbyint(static_cast<double>(x[j] / step.scale)) + step.zero_point;
      const double q = std::clamp(nearest, static_cast<double>(grid.qmin), static_cast<double>(grid.qmax));
      const int64_t zero = c.zeros ? p.zero_points[r * p.groups + g] : c.bits == 4 ? 8 : 128;
      total += static_cast<int64_t>(q - step.zero_point) * (p.codes[r * c.k + j] - zero);
    }
    const double part = static_cast<double>(total) * p.scales.wide[r * p.groups + g] * step.scale;
    y += part, magnitude += std::abs(part);
  }
  y += p.bias.wide[r], magnitude += std::abs(p.bias.wide[r]);
  // A rounding of the total, of its product, of each sum, of the token's product, of the bias's sum; below float32's normal numbers each
  // is off by half of the smallest. One more for products of these errors.
  const double roundings = static_cast<double>(p.groups + 5);
  double bound = roundings * (0x1p-24 * magnitude + 0x1p-150);
  if (c.type == Float::kBfloat16) bound += 0x1p-8 * (std::abs(y) + bound) + 0x1p-134;
  return {y, bound};
}

// y as float32, and how many tokens were not finite.
struct Result {
  std::vector<float> y;
  size_t odd;
};

Result Compute(const Problem& p, const uint8_t* packed, const InstructionSet& set, size_t num_threads) {
  const Case& c = p.c;
  const Header& header = *reinterpret_cast<const Header*>(packed);
  const bool wide = c.type == Float::kFloat32;
  Result result{std::vector<float>(c.m * c.n), 0};
  std::vector<uint16_t> narrow(wide ? 0 : c.m * c.n);
  void* y = wide ? static_cast<void*>(result.y.data()) : narrow.data();
  result.odd = Run({View(header, packed), {p.x.Data(), c.type}, c.m, kGrids[c.grid], {p.bias.Data(), c.type}, y, c.type}, set, num_threads);
  for (size_t i = 0; i < narrow.size(); ++i) {
    const uint32_t bits = static_cast<uint32_t>(narrow[i]) << 16;
    std::memcpy(&result.y[i], &bits, 4);
  }
  return result;
}

bool Say(const Case& c, const char* set, size_t t, size_t r, double found, double expected) {
  std::printf("%s, %zu x %zu, %zu tokens from kind %zu on, groups of %zu, %u bits, zeros %d, scales %u, floats %u, grid %zu: "
              "[%zu, %zu] is %.9g, not %.9g\n",
              set, c.n, c.k, c.m, c.first_kind, c.group_size, c.bits, c.zeros, static_cast<unsigned>(c.scale_type),
              static_cast<unsigned>(c.type), c.grid, t, r, found, expected);
  return false;
}

bool CheckPlain(const Problem& p, const Result& plain) {
  const Case& c = p.c;
  size_t odd = 0;
  for (size_t t = 0; t < c.m; ++t) {
    const bool nan = p.Odd(t);
    odd += nan;
    for (size_t r = 0; r < c.n; ++r) {
      const float found = plain.y[t * c.n + r];
      const Expected expected = nan ? Expected{std::nan(""), 0} : Sum(p, t, r);
      if (nan ? !std::isnan(found) : !(std::abs(found - expected.y) <= expected.bound)) {
        return Say(c, "portable", t, r, found, expected.y);
      }
    }
  }
  if (plain.odd != odd) std::printf("%zu tokens are not finite, %zu were found\n", odd, plain.odd);
  return plain.odd == odd;
}

bool CheckSame(const Problem& p, const char* set, const Result& plain, const Result& other) {
  for (size_t i = 0; i < plain.y.size(); ++i) {
    const float expected = plain.y[i], found = other.y[i];
    const bool same = std::isnan(expected) ? std::isnan(found) : BitsOf(expected) == BitsOf(found);
    if (!same) return Say(p.c, set, i / p.c.n, i % p.c.n, found, expected);
  }
  if (plain.odd != other.odd) std::printf("%s: %zu tokens are not finite, %zu were found\n", set, plain.odd, other.odd);
  return plain.odd == other.odd;
}

bool Check(const Case& c, const std::vector<std::string>& sets) {
  const Problem p(c);
  const bool has_sums = HasZeros(kGrids[c.grid]);
  const Header header{kMagic, c.bits, c.n, c.k, c.group_size, c.scale_type, c.zeros, has_sums, c.bits == 4 ? 8 : 128, {}};
  struct Free {
    void operator()(uint8_t* memory) const { operator delete(memory, std::align_val_t(64)); }
  };
  const std::unique_ptr<uint8_t, Free> packed(static_cast<uint8_t*>(operator new(View(header, nullptr).bytes, std::align_val_t(64))));
  Pack(header, {p.codes.data(), 0, p.scales.Data(), c.zeros ? p.zero_points.data() : nullptr}, packed.get(), 1);
  const Result plain = Compute(p, packed.get(), *Find("portable", 0), 1);
  bool right = CheckPlain(p, plain);
  for (const std::string& name : sets) {
    for (const size_t num_threads : {1, 2}) {
      right = CheckSame(p, name.c_str(), plain, Compute(p, packed.get(), *Find(name.c_str(), 0), num_threads)) && right;
    }
  }
  return right;
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> sets = InstructionSets();
  for (const std::string& name : sets) std::printf("%s ", name.c_str());
  if (argc > 1 && sets != std::vector<std::string>(argv + 1, argv + argc)) {
    std::printf("are found: not what was asked for\n");
    return 1;
  }
  int wrong = 0, cases = 0;
  for (const auto& [n, k, m] : {std::array<size_t, 3>{1, 1, 1}, {70, 600, 1}, {5, 31, 2}, {64, 32, 3}, {63, 33, 4}, {65, 129, 5},
                                {3, 260, 6}, {130, 96, 7}, {17, 600, 8}, {9, 64, 9}, {5, 600, 13}, {66, 160, 17}, {2, 1030, 23},
                                {7, 70, 40}}) {
    for (const size_t group_size : {size_t{32}, size_t{64}, size_t{128}, k}) {
      for (const uint32_t bits : {4u, 8u}) {
        for (const bool zeros : {false, true}) {
          for (size_t grid = 0; grid < std::size(kGrids); ++grid) {
            const Float scale_type = std::array{Float::kFloat32, Float::kFloat16, Float::kBfloat16}[cases % 3];
            const Float type = cases / 3 % 2 == 0 ? Float::kFloat32 : Float::kBfloat16;
            wrong += !Check({n, k, m, group_size, bits, zeros, scale_type, type, grid, static_cast<size_t>(cases) % kKinds}, sets);
            ++cases;
          }
        }
      }
    }
  }
  std::printf(": %d cases, %d wrong\n", cases, wrong);
  return wrong != 0;
}
