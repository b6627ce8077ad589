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

#include "gptq/columns.h"
#include "hqq/solve.h"
#include "packing/bits.h"
#include "rounding/rounding.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace {

using halfbin::CodeFormat;
using halfbin::CodeKind;
using halfbin::Covers;
using halfbin::ScaleRule;
using halfbin::ScaleType;

template <class T>
using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Numbers = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;  // float32, bfloat16 or float16
using Upper = nb::ndarray<const float, nb::ndim<2>, nb::device::cpu>;  // rows may lie apart
template <class T>
using Flat = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

const halfbin::RoundingKernels& Kernels(const std::string& instruction_set) {
  const halfbin::RoundingKernels* kernels = halfbin::RoundingKernelsOf(instruction_set.c_str());
  if (kernels == nullptr) throw nb::value_error("no such instruction set in this build");
  return *kernels;
}

halfbin::Rows RowsOf(const Numbers& x, size_t size) {
  const nb::dlpack::dtype type = x.dtype();
  halfbin::Element element = halfbin::Element::kFloat32;
  if (type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat)) {
    element = halfbin::Element::kBfloat16;
  } else if (type.bits == 16) {
    element = halfbin::Element::kFloat16;
  }
  const bool known = type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat) ||
                     (type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float) && (type.bits == 16 || type.bits == 32));
  if (!known || size == 0) throw nb::value_error("expected float32, bfloat16 or float16, and a size above 0");
  return {x.data(), element, x.shape(0), x.shape(1), size};
}

void Expect(bool fits) {
  if (!fits) throw nb::value_error("shapes do not fit");
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

bool FitAndRound(const std::string& set, const Numbers& x, size_t size, const CodeFormat& format, const ScaleRule& rule,
                 Matrix<uint8_t> codes, int bits, int lowest, Matrix<uint8_t> scale, std::optional<Matrix<int32_t>> zero,
                 size_t num_threads) {
  const halfbin::Rows rows = RowsOf(x, size);
  const size_t num_tiles = (rows.n + size - 1) / size;
  const size_t scale_bytes = rule.stored == ScaleType::kFloat32 ? 4 : rule.stored == ScaleType::kE8m0 ? 1 : 2;
  Expect(bits >= 0 && bits <= 8 && codes.shape(0) == rows.num_rows);
  Expect(bits == 0 ? codes.shape(1) == rows.n : codes.shape(1) >= halfbin::PackedSize(rows.n, bits));
  Expect(scale.shape(0) == rows.num_rows && scale.shape(1) == num_tiles * scale_bytes);
  Expect(zero.has_value() == (rule.covers == Covers::kRange));
  Expect(!zero || (zero->shape(0) == rows.num_rows && zero->shape(1) == num_tiles));
  const halfbin::CodesOut out{codes.data(), bits, static_cast<uint8_t>(lowest), codes.shape(1)};
  const nb::gil_scoped_release let_others_go_on;
  return halfbin::FitAndRound(Kernels(set), rows, format, rule, out, scale.data(), zero ? zero->data() : nullptr,
                              num_threads);
}

void RoundWith(const std::string& set, const Numbers& x, size_t size, const CodeFormat& format, Matrix<const float> scale,
               std::optional<Matrix<const int32_t>> zero, Matrix<uint8_t> codes, size_t num_threads) {
  const halfbin::Rows rows = RowsOf(x, size);
  const size_t num_tiles = (rows.n + size - 1) / size;
  Expect(codes.shape(0) == rows.num_rows && codes.shape(1) == rows.n);
  Expect(scale.shape(0) == rows.num_rows && scale.shape(1) == num_tiles);
  Expect(!zero || (zero->shape(0) == rows.num_rows && zero->shape(1) == num_tiles));
  const nb::gil_scoped_release let_others_go_on;
  halfbin::RoundWith(Kernels(set), rows, format, scale.data(), zero ? zero->data() : nullptr, codes.data(), num_threads);
}

std::tuple<double, double, double> Compare(const std::string& set, const Numbers& x, size_t size, const CodeFormat& format,
                                           Matrix<const uint8_t> codes, Matrix<const float> scale,
                                           std::optional<Matrix<const int32_t>> zero, size_t num_threads) {
  const halfbin::Rows rows = RowsOf(x, size);
  const size_t num_tiles = (rows.n + size - 1) / size;
  Expect(codes.shape(0) == rows.num_rows && codes.shape(1) == rows.n);
  Expect(scale.shape(0) == rows.num_rows && scale.shape(1) == num_tiles);
  Expect(!zero || (zero->shape(0) == rows.num_rows && zero->shape(1) == num_tiles));
  const nb::gil_scoped_release let_others_go_on;
  const halfbin::ErrorSums sums = halfbin::Compare(Kernels(set), rows, format, codes.data(), scale.data(),
                                                   zero ? zero->data() : nullptr, num_threads);
  return {sums.signal, sums.noise, sums.max_abs};
}

bool Search(const std::string& set, const Numbers& x, size_t size, const CodeFormat& format, const ScaleRule& rule,
            const std::vector<float>& factors, Matrix<float> least, Matrix<float> greatest, size_t num_threads) {
  const halfbin::RoundingKernels& kernels = Kernels(set);
  const halfbin::Rows rows = RowsOf(x, size);
  const size_t num_tiles = (rows.n + size - 1) / size;
  Expect(least.shape(0) == rows.num_rows && least.shape(1) == num_tiles);
  Expect(greatest.shape(0) == rows.num_rows && greatest.shape(1) == num_tiles);
  const nb::gil_scoped_release let_others_go_on;
  return halfbin::Search(kernels, rows, format, rule, factors.data(), factors.size(), least.data(), greatest.data(),
                         num_threads);
}

const halfbin::PackingKernels& Packing(const std::string& instruction_set) {
  return *Kernels(instruction_set).packing;
}

bool PackRows(const std::string& set, Matrix<const uint8_t> codes, int bits, int lowest, Matrix<uint8_t> packed,
              size_t num_threads) {
  Expect(bits >= 1 && bits <= 8 && packed.shape(0) == codes.shape(0));
  Expect(packed.shape(1) >= halfbin::PackedSize(codes.shape(1), bits));
  const nb::gil_scoped_release let_others_go_on;
  return halfbin::PackRows(Packing(set), codes.data(), codes.shape(0), codes.shape(1), bits, static_cast<uint8_t>(lowest),
                           packed.data(), packed.shape(1), num_threads);
}

void UnpackRows(const std::string& set, Matrix<const uint8_t> packed, int bits, int lowest, Matrix<uint8_t> codes,
                size_t num_threads) {
  Expect(bits >= 1 && bits <= 8 && packed.shape(0) == codes.shape(0));
  Expect(packed.shape(1) >= halfbin::PackedSize(codes.shape(1), bits));
  const nb::gil_scoped_release let_others_go_on;
  halfbin::UnpackRows(Packing(set), packed.data(), packed.shape(1), codes.shape(0), codes.shape(1), bits,
                      static_cast<uint8_t>(lowest), codes.data(), num_threads);
}

void RoundColumns(const std::string& set, Matrix<float> columns, size_t num_rounded, Upper upper, const CodeFormat& format,
                  Matrix<const float> scale, std::optional<Matrix<const float>> zero, Flat<const int64_t> tiles,
                  Matrix<uint8_t> codes) {
  const halfbin::RoundColumnsKernel kernel = halfbin::RoundColumnsOf(set.c_str());
  Expect(kernel != nullptr);
  const size_t num_columns = columns.shape(0), num_rows = columns.shape(1);
  Expect(num_columns <= halfbin::kMostColumns && num_rounded <= num_columns && tiles.shape(0) == num_rounded);
  Expect(upper.shape(0) >= num_rounded && upper.shape(1) == num_columns && upper.stride(1) == 1);
  Expect(codes.shape(0) == num_rounded && codes.shape(1) == num_rows);
  Expect(scale.shape(1) == 1 || scale.shape(1) == num_rows);
  Expect(!zero || (zero->shape(0) == scale.shape(0) && zero->shape(1) == scale.shape(1)));
  for (size_t j = 0; j < num_rounded; ++j) Expect(tiles(j) >= 0 && static_cast<size_t>(tiles(j)) < scale.shape(0));
  const halfbin::Columns work{columns.data(), num_columns, num_rounded, num_rows, upper.data(),
                              static_cast<size_t>(upper.stride(0)), scale.data(), zero ? zero->data() : nullptr,
                              scale.shape(1), tiles.data(), codes.data()};
  const nb::gil_scoped_release let_others_go_on;
  kernel(work, format);
}

void SolveHqq(const std::string& set, Matrix<const float> tiles, const CodeFormat& format, ScaleType stored,
              Flat<float> scale, std::optional<Flat<int32_t>> zero, int iterations, float p, double beta, double growth,
              size_t num_threads) {
  const halfbin::SolveHqqKernel kernel = halfbin::SolveHqqOf(set.c_str());
  Expect(kernel != nullptr && scale.shape(0) == tiles.shape(0) && (!zero || zero->shape(0) == tiles.shape(0)));
  const halfbin::HqqTiles work{tiles.data(), tiles.shape(0), tiles.shape(1), scale.data(), zero ? zero->data() : nullptr};
  const nb::gil_scoped_release let_others_go_on;
  halfbin::SolveHqq(kernel, work, format, stored, {iterations, p, beta, growth}, num_threads);
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
  m.def("fit_and_round", &FitAndRound, "instruction_set"_a, "x"_a, "size"_a, "format"_a, "rule"_a, "codes"_a, "bits"_a,
        "lowest"_a, "scale"_a, "zero"_a.none(), "num_threads"_a);
  m.def("round_with", &RoundWith, "instruction_set"_a, "x"_a, "size"_a, "format"_a, "scale"_a, "zero"_a.none(), "codes"_a,
        "num_threads"_a);
  m.def("compare", &Compare, "instruction_set"_a, "x"_a, "size"_a, "format"_a, "codes"_a, "scale"_a, "zero"_a.none(),
        "num_threads"_a);
  m.def("search_ranges", &Search, "instruction_set"_a, "x"_a, "size"_a, "format"_a, "rule"_a, "factors"_a, "least"_a,
        "greatest"_a, "num_threads"_a);
  m.def("pack_rows", &PackRows, "instruction_set"_a, "codes"_a, "bits"_a, "lowest"_a, "packed"_a, "num_threads"_a);
  m.def("unpack_rows", &UnpackRows, "instruction_set"_a, "packed"_a, "bits"_a, "lowest"_a, "codes"_a, "num_threads"_a);
  m.def("round_columns", &RoundColumns, "instruction_set"_a, "columns"_a, "num_rounded"_a, "upper"_a, "format"_a, "scale"_a,
        "zero"_a.none(), "tiles"_a, "codes"_a);
  m.def("solve_hqq", &SolveHqq, "instruction_set"_a, "tiles"_a, "format"_a, "stored"_a, "scale"_a, "zero"_a.none(),
        "iterations"_a, "p"_a, "beta"_a, "growth"_a, "num_threads"_a);
}
