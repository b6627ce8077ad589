// Linear layers whose codes stand for floats, from end to end: the plain form against sums in double precision, every other
// instruction set against the plain form to the bit, on one thread and on two; and what was packed against what comes back.
//
// Memory of each size is allocated exactly, so that a read or write past its end is seen. Prints what differs; exit code 1 then.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu/features.h"
#include "floats/linear.h"

namespace {

using namespace halfbin::floats;

std::mt19937 generator(1);

uint32_t Random(uint32_t end) { return std::uniform_int_distribution<uint32_t>(0, end - 1)(generator); }
double Signed() { return std::uniform_real_distribution<double>(-1, 1)(generator); }

struct Case {
  Kind kind;
  size_t n, k, group_size, m;
  Float scale_type, type;  // of weights' scales; of x, bias and y
  bool bias, not_numbers;
};

// What a code stands for, from its fields.
double ValueOf(const Header& header, uint8_t code) {
  if (header.kind == Kind::kTable) return static_cast<double>(header.table[code]);
  const int mantissa_bits = header.kind == Kind::kE4m3 ? 3 : 2, bias = header.kind == Kind::kE4m3 ? 7 : 15;
  const int magnitude = code & 0x7f, exponent = magnitude >> mantissa_bits, mantissa = magnitude & ((1 << mantissa_bits) - 1);
  const double sign = code & 0x80 ? -1 : 1;
  if (header.kind == Kind::kE4m3 && magnitude == 0x7f) return std::nan("");
  if (header.kind == Kind::kE5m2 && exponent == 31) return mantissa ? std::nan("") : sign * INFINITY;
  const int hidden = exponent == 0 ? 0 : 1 << mantissa_bits;
  return sign * std::ldexp(hidden + mantissa, std::max(exponent, 1) - bias - mantissa_bits);
}

uint32_t BitsOf(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// A number of a type that may be narrower, cut off, and the bytes of many.
float Put(Float type, float x, std::vector<uint8_t>& bytes) {
  uint32_t bits = BitsOf(x);
  if (type == Float::kBfloat16) bits &= 0xffff0000u;
  if (type == Float::kFloat16) bits &= 0xffffe000u;  // normal ones
  uint8_t parts[4];
  std::memcpy(parts, &bits, 4);
  const uint16_t half = static_cast<uint16_t>((bits - (112u << 23)) >> 13);
  if (type == Float::kFloat32) bytes.insert(bytes.end(), parts, parts + 4);
  if (type == Float::kBfloat16) bytes.insert(bytes.end(), parts + 2, parts + 4);
  if (type == Float::kFloat16) bytes.insert(bytes.end(), reinterpret_cast<const uint8_t*>(&half), reinterpret_cast<const uint8_t*>(&half) + 2);
  std::memcpy(&x, &bits, 4);
  return x;
}

struct Layer {
  Header header{};
  std::vector<uint8_t> codes, scales, x, bias;  // as bytes
  std::vector<float> wide_scales, wide_x, wide_bias;
  size_t groups;

  explicit Layer(const Case& c) : groups((c.k - 1) / c.group_size + 1) {
    header = {kMagic, c.kind, c.n, c.k, c.group_size, c.scale_type, 16, 0, 0, {}};
    if (c.kind == Kind::kTable) {
      for (float& value : header.table) value = static_cast<float>(Signed());
    }
    for (size_t i = 0; i < c.n * c.k; ++i) codes.push_back(CodeOf(c));
    for (size_t i = 0; i < c.n * groups; ++i) {
      wide_scales.push_back(Put(c.scale_type, static_cast<float>(0.01 + 0.005 * Signed()), scales));
    }
    for (size_t i = 0; i < c.m * c.k; ++i) wide_x.push_back(Put(c.type, static_cast<float>(Signed()), x));
    for (size_t i = 0; i < c.n; ++i) wide_bias.push_back(Put(c.type, static_cast<float>(Signed()), bias));
  }

  static uint8_t CodeOf(const Case& c) {
    if (c.kind == Kind::kTable) return static_cast<uint8_t>(Random(16));
    const uint8_t code = static_cast<uint8_t>(Random(256));
    const bool finite = (code & 0x7f) < (c.kind == Kind::kE4m3 ? 0x7f : 0x7c);
    return finite || (c.not_numbers && Random(8) == 0) ? code : static_cast<uint8_t>(code & 0x80);
  }
};

struct Expected {
  double y, bound;
};

// s + G + 1 roundings, the last one to the type of y; below float32's normal numbers each is off by half of the smallest, which
// the unit and the scale then multiply.
Expected Sum(const Case& c, const Layer& layer, size_t t, size_t r) {
  double y = c.bias ? static_cast<double>(layer.wide_bias[r]) : 0, magnitude = std::abs(y);
  for (size_t j = 0; j < c.k; ++j) {
    const double w = static_cast<double>(layer.wide_scales[r * layer.groups + j / c.group_size]) * ValueOf(layer.header, layer.codes[r * c.k + j]);
    const double part = w * static_cast<double>(layer.wide_x[t * c.k + j]);
    y += part, magnitude += std::abs(part);
  }
  const double roundings = static_cast<double>(std::min(c.k, c.group_size) + layer.groups + 2);
  double bound = roundings * (0x1p-24 * magnitude + 0x1p-140);
  if (c.type == Float::kBfloat16) bound += 0x1p-8 * (std::abs(y) + bound);
  return {y, bound};
}

struct Free {
  void operator()(uint8_t* memory) const { operator delete(memory, std::align_val_t(64)); }
};
using Memory = std::unique_ptr<uint8_t, Free>;

Memory Allocate(size_t bytes) { return Memory(static_cast<uint8_t*>(operator new(bytes, std::align_val_t(64)))); }

std::vector<float> Compute(const Case& c, const Layer& layer, const Weights& weights, const InstructionSet& set, size_t num_threads) {
  std::vector<uint8_t> y(c.m * c.n * (c.type == Float::kFloat32 ? 4 : 2));
  const Tensor bias{c.bias ? layer.bias.data() : nullptr, c.type};
  Run({weights, {layer.x.data(), c.type}, c.m, bias, y.data()}, set, num_threads);
  std::vector<float> wide(c.m * c.n);
  for (size_t i = 0; i < wide.size(); ++i) {
    uint32_t bits = 0;
    if (c.type == Float::kFloat32) {
      std::memcpy(&bits, &y[i * 4], 4);
    } else {
      std::memcpy(reinterpret_cast<uint8_t*>(&bits) + 2, &y[i * 2], 2);
    }
    std::memcpy(&wide[i], &bits, 4);
  }
  return wide;
}

bool Say(const Case& c, const char* what, size_t at, double found, double expected) {
  std::printf("%s, kind %u, %zu x %zu, groups of %zu, %zu tokens, scales %u, floats %u, bias %d: [%zu] is %.9g, not %.9g\n", what,
              static_cast<unsigned>(c.kind), c.n, c.k, c.group_size, c.m, static_cast<unsigned>(c.scale_type),
              static_cast<unsigned>(c.type), c.bias, at, found, expected);
  return false;
}

bool Same(float a, float b) { return std::isnan(a) ? std::isnan(b) : BitsOf(a) == BitsOf(b); }

bool CheckPlain(const Case& c, const Layer& layer, const std::vector<float>& plain) {
  for (size_t i = 0; i < plain.size(); ++i) {
    const Expected expected = Sum(c, layer, i / c.n, i % c.n);
    const double found = static_cast<double>(plain[i]);
    const bool right = std::isfinite(expected.y)  ? std::abs(found - expected.y) <= expected.bound
                       : std::isnan(expected.y) ? std::isnan(found)
                                                : found == expected.y;
    if (!right) return Say(c, "portable", i, found, expected.y);
  }
  return true;
}

// To the nearest bfloat16, half to even; of normal numbers.
float ToBfloat16(float x) {
  int exponent;
  const double fraction = std::frexp(static_cast<double>(x), &exponent);
  return static_cast<float>(std::ldexp(std::nearbyint(std::ldexp(fraction, 8)), exponent - 8));
}

// w_hat of every panel, in both types, against one rounding of the exact product, or two.
bool CheckDequantized(const Case& c, const Layer& layer, const Weights& w, const InstructionSet& set) {
  const size_t stride = w.num_panels * kPanelRows;
  std::vector<float> wide(c.k * stride);
  std::vector<uint16_t> narrow(c.k * stride);
  Dequantize(w, 0, w.num_panels, Float::kFloat32, wide.data(), set, 2);
  Dequantize(w, 0, w.num_panels, Float::kBfloat16, narrow.data(), set, 1);
  for (size_t i = 0; i < c.n * c.k; ++i) {
    const size_t r = i / c.k, j = i % c.k;
    const float scale = layer.wide_scales[r * layer.groups + j / c.group_size];
    const float expected = static_cast<float>(static_cast<double>(scale) * ValueOf(layer.header, layer.codes[i]));
    if (!Same(wide[j * stride + r], expected)) return Say(c, set.name, i, wide[j * stride + r], expected);
    const uint32_t bits = static_cast<uint32_t>(narrow[j * stride + r]) << 16;
    float found;
    std::memcpy(&found, &bits, 4);
    const float narrowed = std::isfinite(expected) && expected != 0 ? ToBfloat16(expected) : expected;
    if (!Same(found, narrowed)) return Say(c, set.name, i, found, narrowed);
  }
  return true;
}

bool Check(const Case& c, const std::vector<const InstructionSet*>& sets) {
  const Layer layer(c);
  const size_t bytes = View(layer.header, nullptr).bytes;
  const Memory packed = Allocate(bytes);
  if (Pack(layer.header, {layer.codes.data(), layer.scales.data()}, packed.get(), 2) != 0) return Say(c, "packed", 0, 1, 0);
  Header header;
  std::memcpy(&header, packed.get(), sizeof header);
  const Weights weights = View(header, packed.get());
  std::vector<uint8_t> codes(layer.codes.size()), scales(layer.scales.size());
  Unpack(weights, {codes.data(), scales.data()}, 2);
  if (codes != layer.codes || scales != layer.scales) return Say(c, "unpacked", 0, 0, 0);
  const std::vector<float> plain = Compute(c, layer, weights, *Find("portable"), 1);
  bool right = CheckPlain(c, layer, plain);
  for (const InstructionSet* set : sets) {
    right = CheckDequantized(c, layer, weights, *set) && right;
    for (const size_t num_threads : {1, 2}) {
      const std::vector<float> other = Compute(c, layer, weights, *set, num_threads);
      for (size_t i = 0; i < plain.size() && right; ++i) {
        if (!Same(plain[i], other[i])) right = Say(c, set->name, i, other[i], plain[i]);
      }
    }
  }
  return right;
}

bool CheckWrongCodes() {
  Header header{kMagic, Kind::kTable, 1, 3, 3, Float::kFloat32, 5, 0, 0, {}};
  const uint8_t codes[] = {4, 5, 255};
  const float scale = 1;
  const Memory packed = Allocate(View(header, nullptr).bytes);
  const size_t wrong = Pack(header, {codes, &scale}, packed.get(), 1);
  if (wrong != 2) std::printf("2 codes are none of the table's, %zu were found\n", wrong);
  return wrong == 2;
}

}  // namespace

int main() {
  const std::vector<std::string> here = halfbin::CpuFeatures();
  std::vector<const InstructionSet*> sets;
  for (const char* name : {"avx512", "avx2", "portable"}) {
    const bool runs = std::strcmp(name, "portable") == 0 || std::find(here.begin(), here.end(), name) != here.end();
    if (runs) sets.push_back(Find(name)), std::printf("%s ", name);
  }
  int wrong = !CheckWrongCodes(), cases = 1;
  constexpr Float kTypes[] = {Float::kFloat32, Float::kFloat16, Float::kBfloat16};
  for (const Kind kind : {Kind::kTable, Kind::kE4m3, Kind::kE5m2}) {
    for (const auto& [n, k, m] : {std::array<size_t, 3>{1, 1, 1}, {70, 300, 1}, {5, 31, 2}, {64, 32, 3}, {63, 33, 4}, {65, 129, 5},
                                  {3, 260, 6}, {130, 96, 7}, {17, 300, 8}, {9, 64, 16}, {5, 140, 13}, {2, 300, 259}}) {
      for (const size_t group_size : {size_t{8}, size_t{64}, size_t{136}, k}) {
        const Case c{kind, n, k, group_size, m, kTypes[cases % 3], cases / 3 % 2 ? Float::kBfloat16 : Float::kFloat32, cases % 5 != 0,
                     cases % 4 == 0};
        wrong += !Check(c, sets);
        ++cases;
      }
    }
  }
  std::printf(": %d cases, %d wrong\n", cases, wrong);
  return wrong != 0;
}
