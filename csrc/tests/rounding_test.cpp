// Rounding to nearest on every instruction set that this processor runs: integers against one division after the other, all formats
// against the plain loops to the bit, packed and compared in one pass against the same in steps, on one thread and on three. Prints what
// differs; exit code 1 then.
#include "rounding/rounding.h"

#include "sets.h"

namespace {

using namespace halfbin;
using tests::Hostile;
using tests::Same;

struct Scheme {
  const char* name;
  CodeFormat format;
  int bits, lowest;
  ScaleRule rule;
};

CodeFormat Integers(int qmin, int qmax) {
  CodeFormat format;
  format.qmin = qmin;
  format.qmax = qmax;
  return format;
}

CodeFormat Floats(int exponent_bits, int mantissa_bits, int bias, float largest) {
  CodeFormat format;
  format.kind = CodeKind::kFloats;
  format.mantissa_bits = mantissa_bits;
  format.bias = bias;
  format.sign_bit = exponent_bits + mantissa_bits;
  format.largest = largest;
  for (int code = 0; code < 2 << format.sign_bit; ++code) {
    const int size = code & ((1 << format.sign_bit) - 1), exponent = size >> mantissa_bits, mantissa = size & ((1 << mantissa_bits) - 1);
    const int significand = exponent ? mantissa + (1 << mantissa_bits) : mantissa;
    const float value = std::ldexp(static_cast<float>(significand), (exponent ? exponent : 1) - bias - mantissa_bits);
    format.values[code] = code >> format.sign_bit ? -value : value;
  }
  return format;
}

CodeFormat Table(const std::vector<float>& values) {
  CodeFormat format;
  format.kind = CodeKind::kTable;
  std::copy(values.begin(), values.end(), format.values);
  format.num_boundaries = static_cast<int>(values.size()) - 1;
  for (size_t i = 1; i < values.size(); ++i) format.boundaries[i - 1] = (values[i - 1] + values[i]) / 2;
  return format;
}

const Scheme kSchemes[] = {
    {"int4", Integers(-8, 7), 4, -8, {Covers::kBothAlike, 7, ScaleType::kFloat32}},
    {"int4, zero points", Integers(-8, 7), 4, -8, {Covers::kRange, 15, ScaleType::kFloat16}},
    {"uint4, zero points", Integers(0, 15), 4, 0, {Covers::kRange, 15, ScaleType::kBfloat16}},
    {"uint4", Integers(0, 15), 4, 0, {Covers::kPositive, 15, ScaleType::kFloat32}},
    {"int3", Integers(-4, 3), 3, -4, {Covers::kBothAlike, 3, ScaleType::kBfloat16}},
    {"int8", Integers(-128, 127), 8, -128, {Covers::kBothAlike, 127, ScaleType::kE8m0}},
    {"fp8", Floats(4, 3, 7, 448), 8, 0, {Covers::kBothAlike, 448, ScaleType::kFloat32}},
    {"fp4", Floats(2, 1, 1, 6), 4, 0, {Covers::kBothAlike, 6, ScaleType::kE8m0}},
    {"a table", Table({-1, -0.5f, 0, 0.25f, 1}), 3, 0, {Covers::kBothAlike, 1, ScaleType::kFloat32}},
    {"a table of 16", Table({-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7}), 4, 0, {Covers::kBothAlike, 8, ScaleType::kFloat16}},
};

// Numbers of each type, as bytes.
std::vector<uint8_t> Stored(const std::vector<float>& x, Element element) {
  const size_t size = element == Element::kFloat32 ? 4 : 2;
  std::vector<uint8_t> bytes(x.size() * size);
  for (size_t i = 0; i < x.size(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, &x[i], sizeof(bits));
    if (element == Element::kBfloat16) bits >>= 16;
    if (element == Element::kFloat16) bits = (bits >> 16 & 0x8000u) | (bits * 2654435761u >> 16) % 0x7c00u;  // any finite one
    std::memcpy(bytes.data() + i * size, &bits, size);
  }
  return bytes;
}

struct Found {
  bool finite = false;
  std::vector<uint8_t> codes, packed, scale;
  std::vector<int32_t> zero;
  ErrorSums sums, compared;
};

size_t ScaleBytes(ScaleType type) { return type == ScaleType::kFloat32 ? 4 : type == ScaleType::kE8m0 ? 1 : 2; }

// Scales as float32, from how they are stored.
std::vector<float> Wide(const std::vector<uint8_t>& stored, ScaleType type) {
  const size_t size = ScaleBytes(type);
  std::vector<float> wide(stored.size() / size);
  for (size_t i = 0; i < wide.size(); ++i) {
    uint32_t bits = 0;
    std::memcpy(&bits, stored.data() + i * size, size);
    switch (type) {
      case ScaleType::kFloat32:
        std::memcpy(&wide[i], &bits, sizeof(bits));
        break;
      case ScaleType::kBfloat16:
        bits <<= 16;
        std::memcpy(&wide[i], &bits, sizeof(bits));
        break;
      case ScaleType::kFloat16: {
        const int exponent = static_cast<int>(bits >> 10), mantissa = static_cast<int>(bits & 1023);
        wide[i] = std::ldexp(static_cast<float>(exponent ? mantissa + 1024 : mantissa), (exponent ? exponent : 1) - 25);
        break;
      }
      case ScaleType::kE8m0:
        wide[i] = std::ldexp(1.0f, static_cast<int>(bits) - 127);
        break;
    }
  }
  return wide;
}

Found Fit(const char* set, const Rows& rows, const Scheme& scheme, size_t num_threads) {
  const RoundingKernels& kernels = *RoundingKernelsOf(set);
  const size_t tiles = (rows.n + rows.size - 1) / rows.size, row_bytes = PackedSize(rows.n, scheme.bits) + 1;
  Found found;
  found.codes.resize(rows.num_rows * rows.n);
  found.packed.assign(rows.num_rows * row_bytes, 0xaa);
  found.scale.resize(rows.num_rows * tiles * ScaleBytes(scheme.rule.stored));
  found.zero.resize(rows.num_rows * tiles);
  int32_t* const zero = scheme.rule.covers == Covers::kRange ? found.zero.data() : nullptr;
  const CodesOut bytes{found.codes.data(), 0, 0, rows.n};
  found.finite = FitAndRound(kernels, rows, scheme.format, scheme.rule, bytes, found.scale.data(), zero, num_threads, nullptr);
  std::vector<uint8_t> scale(found.scale.size());
  std::vector<int32_t> zeros(found.zero.size());
  const CodesOut packed{found.packed.data(), scheme.bits, static_cast<uint8_t>(scheme.lowest), row_bytes};
  const bool again = FitAndRound(kernels, rows, scheme.format, scheme.rule, packed, scale.data(), zero ? zeros.data() : nullptr,
                                 num_threads, &found.sums);
  if (!found.finite || !again) {
    found.finite = found.finite || again;
    return found;
  }
  if (scale != found.scale || zeros != found.zero) std::printf("%s: one pass has other scales\n", scheme.name), found.finite = false;
  found.compared = Compare(kernels, rows, scheme.format, found.codes.data(), Wide(found.scale, scheme.rule.stored).data(), zero,
                           num_threads);
  return found;
}

bool SameSums(const ErrorSums& a, const ErrorSums& b) { return a.signal == b.signal && a.noise == b.noise && a.max_abs == b.max_abs; }

// Codes of integers are the nearest ones under their scales; sums are those of the definition.
int WrongByTheDefinition(const std::vector<float>& x, const Rows& rows, const Scheme& scheme, const Found& found) {
  const size_t tiles = (rows.n + rows.size - 1) / rows.size;
  const std::vector<float> scale = Wide(found.scale, scheme.rule.stored);
  int wrong = 0;
  double signal = 0, noise = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const size_t tile = i / rows.n * tiles + i % rows.n / rows.size;
    const int zero = found.zero[tile];
    const bool integers = scheme.format.kind == CodeKind::kIntegers;
    const int code = integers && scheme.format.qmin < 0 ? static_cast<int8_t>(found.codes[i]) : found.codes[i];
    if (integers) {
      const float steps = std::min(std::max(x[i] / scale[tile], -131072.0f), 131072.0f);
      const int nearest = static_cast<int>(std::nearbyint(steps)) + zero;
      wrong += code != std::min(std::max(nearest, scheme.format.qmin), scheme.format.qmax);
    }
    const float value = integers ? static_cast<float>(code - zero) : scheme.format.values[code];
    const float move = value * scale[tile] - x[i];
    signal += static_cast<double>(x[i]) * x[i];
    noise += static_cast<double>(move) * move;
  }
  const auto close = [&](double a, double b) { return std::abs(a - b) <= 1e-15 * static_cast<double>(x.size()) * std::abs(b); };
  return wrong + !close(found.sums.signal, signal) + !close(found.sums.noise, noise);
}

int Wrong(const char* set, const Scheme& scheme, Element element, size_t num_rows, size_t n, size_t size, uint32_t seed) {
  const std::vector<float> numbers = Hostile(num_rows * n, seed);
  const std::vector<uint8_t> stored = Stored(numbers, element);
  const Rows rows{stored.data(), element, num_rows, n, size};
  const Found found = Fit(set, rows, scheme, 1), threads = Fit(set, rows, scheme, 3), plain = Fit("portable", rows, scheme, 1);
  int wrong = !found.finite;
  wrong += found.codes != plain.codes || found.scale != plain.scale || found.zero != plain.zero || found.packed != plain.packed;
  wrong += found.codes != threads.codes || found.scale != threads.scale || found.packed != threads.packed;
  wrong += !SameSums(found.sums, found.compared) || !SameSums(found.sums, plain.sums) || !SameSums(found.sums, threads.sums);
  std::vector<uint8_t> packed(found.packed.size());
  PackRows(kPackingPortable, found.codes.data(), num_rows, n, scheme.bits, static_cast<uint8_t>(scheme.lowest), packed.data(),
           PackedSize(n, scheme.bits) + 1, 1);
  wrong += packed != found.packed;
  if (element == Element::kFloat32) wrong += WrongByTheDefinition(numbers, rows, scheme, found);

  // Scales that clip: a quarter of those that cover the range.
  std::vector<float> scale = Wide(found.scale, scheme.rule.stored), least(scale.size()), greatest(scale.size());
  for (float& s : scale) s = std::max(s / 4, 0x1p-126f);
  std::vector<uint8_t> codes(found.codes.size()), expected(codes.size());
  const int32_t* const zero = scheme.rule.covers == Covers::kRange ? found.zero.data() : nullptr;
  RoundWith(*RoundingKernelsOf(set), rows, scheme.format, scale.data(), zero, codes.data(), 3);
  RoundWith(*RoundingKernelsOf("portable"), rows, scheme.format, scale.data(), zero, expected.data(), 1);
  wrong += codes != expected;

  const float factors[] = {0.9f, 0.7f, 0.5f};
  std::vector<float> plain_least(scale.size()), plain_greatest(scale.size());
  wrong += !Search(*RoundingKernelsOf(set), rows, scheme.format, scheme.rule, factors, 3, least.data(), greatest.data(), 3);
  Search(*RoundingKernelsOf("portable"), rows, scheme.format, scheme.rule, factors, 3, plain_least.data(), plain_greatest.data(), 1);
  wrong += !Same(least, plain_least) || !Same(greatest, plain_greatest);

  // What is not finite is found wherever it stands.
  for (const uint32_t bits : {0x7f800000u, 0xff800000u, 0x7fc00000u}) {
    std::vector<uint8_t> bad = stored;
    const size_t bytes = element == Element::kFloat32 ? 4 : 2, at = (seed * 7919u) % numbers.size();
    const uint32_t there = element == Element::kFloat32 ? bits : element == Element::kBfloat16 ? bits >> 16 : (bits >> 16 & 0x8000u) | 0x7c00u | (bits >> 13 & 0x3ffu);
    std::memcpy(bad.data() + at * bytes, &there, bytes);
    const Rows spoilt{bad.data(), element, num_rows, n, size};
    wrong += Fit(set, spoilt, scheme, 3).finite;
    wrong += Search(*RoundingKernelsOf(set), spoilt, scheme.format, scheme.rule, factors, 3, least.data(), greatest.data(), 1);
  }
  if (wrong) std::printf("%s, %zu x %zu in tiles of %zu, element %d: %d wrong\n", scheme.name, num_rows, n, size, static_cast<int>(element), wrong);
  return wrong;
}

int WrongWith(const char* set) {
  int wrong = 0;
  uint32_t seed = 1;
  for (const Scheme& scheme : kSchemes) {
    for (const Element element : {Element::kFloat32, Element::kBfloat16, Element::kFloat16}) {
      for (const size_t n : {1, 15, 17, 150}) {
        for (const size_t size : {1, 7, 16, 64}) wrong += Wrong(set, scheme, element, 3, n, size, ++seed);
      }
    }
  }
  for (const Scheme& scheme : {kSchemes[1], kSchemes[4]}) {
    wrong += Wrong(set, scheme, Element::kFloat32, 300, 256, 64, ++seed);        // several rows in a task
    wrong += Wrong(set, scheme, Element::kBfloat16, 1, 70'001, 128, ++seed);     // a row in two tasks
    wrong += Wrong(set, scheme, Element::kFloat32, 1, 70'001, 70'001, ++seed);   // a tile of two tasks
    wrong += Wrong(set, scheme, Element::kFloat32, 1, 133'001, 66'001, ++seed);  // tiles that begin within a byte
  }
  return wrong;
}

}  // namespace

int main() { return halfbin::tests::OnEverySet(WrongWith); }
