#include "rounding/bindings.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "arrays.h"
#include "packing/bits.h"
#include "rounding/rounding.h"

namespace halfbin {
namespace {

namespace nb = nanobind;
using nb::literals::operator""_a;

using Numbers = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;  // float32, bfloat16 or float16

const RoundingKernels& Kernels(const std::string& instruction_set) {
  const RoundingKernels* kernels = RoundingKernelsOf(instruction_set.c_str());
  if (kernels == nullptr) throw nb::value_error("no such instruction set in this build");
  return *kernels;
}

Rows RowsOf(const Numbers& x, size_t size) {
  const nb::dlpack::dtype type = x.dtype();
  Element element = Element::kFloat32;
  if (type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat)) {
    element = Element::kBfloat16;
  } else if (type.bits == 16) {
    element = Element::kFloat16;
  }
  const bool known = type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat) ||
                     (type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float) && (type.bits == 16 || type.bits == 32));
  if (!known || size == 0) throw nb::value_error("expected float32, bfloat16 or float16, and a size above 0");
  return {x.data(), element, x.shape(0), x.shape(1), size};
}

CodeFormat Integers(int qmin, int qmax) {
  CodeFormat format;
  format.kind = CodeKind::kIntegers;
  format.qmin = qmin;
  format.qmax = qmax;
  return format;
}

void SetValues(CodeFormat& format, const std::vector<float>& values) {
  Expect(values.size() <= 256);
  std::copy(values.begin(), values.end(), format.values);
}

CodeFormat Floats(int exponent_bits, int mantissa_bits, int bias, float largest, const std::vector<float>& values) {
  Expect(exponent_bits + mantissa_bits <= 7 && mantissa_bits >= 1 && bias >= 1);
  CodeFormat format;
  format.kind = CodeKind::kFloats;
  format.mantissa_bits = mantissa_bits;
  format.bias = bias;
  format.sign_bit = exponent_bits + mantissa_bits;
  format.largest = largest;
  SetValues(format, values);
  return format;
}

CodeFormat Table(const std::vector<float>& boundaries, const std::vector<float>& values) {
  Expect(boundaries.size() + 1 == values.size());
  CodeFormat format;
  format.kind = CodeKind::kTable;
  SetValues(format, values);
  format.num_boundaries = static_cast<int>(boundaries.size());
  std::copy(boundaries.begin(), boundaries.end(), format.boundaries);
  return format;
}

// Whether every code, counted from `lowest`, takes at most `bits` bits.
bool Fits(const CodeFormat& format, int bits, int lowest) {
  switch (format.kind) {
    case CodeKind::kIntegers:
      return lowest <= format.qmin && format.qmax - lowest < 1 << bits;
    case CodeKind::kFloats:
      return lowest == 0 && format.sign_bit < bits;
    case CodeKind::kTable:
      return lowest == 0 && format.num_boundaries < 1 << bits;
  }
  return false;
}

bool Fit(const std::string& set, const Numbers& x, size_t size, const CodeFormat& format, const ScaleRule& rule,
         const Matrix<uint8_t>& codes, int bits, int lowest, const Matrix<uint8_t>& scale,
         const std::optional<Matrix<int32_t>>& zero, size_t num_threads, ErrorSums* sums) {
  const Rows rows = RowsOf(x, size);
  const size_t num_tiles = (rows.n + size - 1) / size;
  const size_t scale_bytes = rule.stored == ScaleType::kFloat32 ? 4 : rule.stored == ScaleType::kE8m0 ? 1 : 2;
  Expect(bits >= 0 && bits <= 8 && codes.shape(0) == rows.num_rows && (bits == 0 || Fits(format, bits, lowest)));
  Expect(bits == 0 ? codes.shape(1) == rows.n : codes.shape(1) >= PackedSize(rows.n, bits));
  Expect(scale.shape(0) == rows.num_rows && scale.shape(1) == num_tiles * scale_bytes);
  Expect(zero.has_value() == (rule.covers == Covers::kRange));
  Expect(!zero || (zero->shape(0) == rows.num_rows && zero->shape(1) == num_tiles));
  const CodesOut out{codes.data(), bits, static_cast<uint8_t>(lowest), codes.shape(1)};
  const nb::gil_scoped_release let_others_go_on;
  return FitAndRound(Kernels(set), rows, format, rule, out, scale.data(), zero ? zero->data() : nullptr, num_threads, sums);
}

bool FitAndRoundRows(const std::string& set, const Numbers& x, size_t size, const CodeFormat& format, const ScaleRule& rule,
                     Matrix<uint8_t> codes, Matrix<uint8_t> scale, std::optional<Matrix<int32_t>> zero, size_t num_threads) {
  return Fit(set, x, size, format, rule, codes, 0, 0, scale, zero, num_threads, nullptr);
}

using Sums = std::tuple<double, double, double>;

std::optional<Sums> FitRoundAndPackRows(const std::string& set, const Numbers& x, size_t size, const CodeFormat& format,
                                        const ScaleRule& rule, Matrix<uint8_t> packed, int bits, int lowest,
                                        Matrix<uint8_t> scale, std::optional<Matrix<int32_t>> zero, bool compare,
                                        size_t num_threads) {
  Expect(bits > 0);
  ErrorSums sums;
  if (!Fit(set, x, size, format, rule, packed, bits, lowest, scale, zero, num_threads, compare ? &sums : nullptr)) return {};
  return Sums{sums.signal, sums.noise, sums.max_abs};
}

void RoundRowsWith(const std::string& set, const Numbers& x, size_t size, const CodeFormat& format, Matrix<const float> scale,
                   std::optional<Matrix<const int32_t>> zero, Matrix<uint8_t> codes, size_t num_threads) {
  const Rows rows = RowsOf(x, size);
  const size_t num_tiles = (rows.n + size - 1) / size;
  Expect(codes.shape(0) == rows.num_rows && codes.shape(1) == rows.n);
  Expect(scale.shape(0) == rows.num_rows && scale.shape(1) == num_tiles);
  Expect(!zero || (zero->shape(0) == rows.num_rows && zero->shape(1) == num_tiles));
  const nb::gil_scoped_release let_others_go_on;
  RoundWith(Kernels(set), rows, format, scale.data(), zero ? zero->data() : nullptr, codes.data(), num_threads);
}

Sums CompareRows(const std::string& set, const Numbers& x, size_t size, const CodeFormat& format, Matrix<const uint8_t> codes,
                 Matrix<const float> scale, std::optional<Matrix<const int32_t>> zero, size_t num_threads) {
  const Rows rows = RowsOf(x, size);
  const size_t num_tiles = (rows.n + size - 1) / size;
  Expect(codes.shape(0) == rows.num_rows && codes.shape(1) == rows.n);
  Expect(scale.shape(0) == rows.num_rows && scale.shape(1) == num_tiles);
  Expect(!zero || (zero->shape(0) == rows.num_rows && zero->shape(1) == num_tiles));
  const nb::gil_scoped_release let_others_go_on;
  const ErrorSums sums = Compare(Kernels(set), rows, format, codes.data(), scale.data(),
                                   zero ? zero->data() : nullptr, num_threads);
  return {sums.signal, sums.noise, sums.max_abs};
}

bool SearchRows(const std::string& set, const Numbers& x, size_t size, const CodeFormat& format, const ScaleRule& rule,
                const std::vector<float>& factors, Matrix<float> least, Matrix<float> greatest, size_t num_threads) {
  const RoundingKernels& kernels = Kernels(set);
  const Rows rows = RowsOf(x, size);
  const size_t num_tiles = (rows.n + size - 1) / size;
  Expect(least.shape(0) == rows.num_rows && least.shape(1) == num_tiles);
  Expect(greatest.shape(0) == rows.num_rows && greatest.shape(1) == num_tiles);
  const nb::gil_scoped_release let_others_go_on;
  return Search(kernels, rows, format, rule, factors.data(), factors.size(), least.data(), greatest.data(),
                num_threads);
}

}  // namespace

void BindRounding(nb::module_& m) {
  nb::enum_<Covers>(m, "Covers")
      .value("BOTH_ALIKE", Covers::kBothAlike)
      .value("POSITIVE", Covers::kPositive)
      .value("RANGE", Covers::kRange);
  nb::enum_<ScaleType>(m, "ScaleType")
      .value("FLOAT32", ScaleType::kFloat32)
      .value("FLOAT16", ScaleType::kFloat16)
      .value("BFLOAT16", ScaleType::kBfloat16)
      .value("E8M0", ScaleType::kE8m0);
  nb::class_<CodeFormat>(m, "CodeFormat")
      .def_static("integers", &Integers, "qmin"_a, "qmax"_a)
      .def_static("floats", &Floats, "exponent_bits"_a, "mantissa_bits"_a, "bias"_a, "largest"_a, "values"_a)
      .def_static("table", &Table, "boundaries"_a, "values"_a);
  nb::class_<ScaleRule>(m, "ScaleRule").def(nb::init<Covers, float, ScaleType>(), "covers"_a, "divisor"_a, "stored"_a);
  m.def("fit_and_round", &FitAndRoundRows, "instruction_set"_a, "x"_a, "size"_a, "format"_a, "rule"_a, "codes"_a,
        "scale"_a, "zero"_a.none(), "num_threads"_a);
  m.def("fit_round_and_pack", &FitRoundAndPackRows, "instruction_set"_a, "x"_a, "size"_a, "format"_a, "rule"_a, "packed"_a,
        "bits"_a, "lowest"_a, "scale"_a, "zero"_a.none(), "compare"_a, "num_threads"_a);
  m.def("round_with", &RoundRowsWith, "instruction_set"_a, "x"_a, "size"_a, "format"_a, "scale"_a, "zero"_a.none(), "codes"_a,
        "num_threads"_a);
  m.def("compare", &CompareRows, "instruction_set"_a, "x"_a, "size"_a, "format"_a, "codes"_a, "scale"_a, "zero"_a.none(),
        "num_threads"_a);
  m.def("search_ranges", &SearchRows, "instruction_set"_a, "x"_a, "size"_a, "format"_a, "rule"_a, "factors"_a, "least"_a,
        "greatest"_a, "num_threads"_a);
}

}  // namespace halfbin
