#include "gptq/bindings.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <string>

#include "arrays.h"
#include "gptq/columns.h"

namespace halfbin {
namespace {

namespace nb = nanobind;
using nb::literals::operator""_a;

using Upper = nb::ndarray<const float, nb::ndim<2>, nb::device::cpu>;  // rows may lie apart
template <class T>
using Flat = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;


void RoundColumns(const std::string& set, Matrix<float> columns, size_t num_rounded, Upper upper, const CodeFormat& format,
                  Matrix<const float> scale, std::optional<Matrix<const float>> zero, Flat<const int64_t> tiles,
                  Matrix<uint8_t> codes) {
  const RoundColumnsKernel kernel = RoundColumnsOf(set.c_str());
  Expect(kernel != nullptr);
  const size_t num_columns = columns.shape(0), num_rows = columns.shape(1);
  Expect(num_columns <= kMostColumns && num_rounded <= num_columns && tiles.shape(0) == num_rounded);
  Expect(upper.shape(0) >= num_rounded && upper.shape(1) == num_columns && upper.stride(1) == 1);
  Expect(codes.shape(0) == num_rounded && codes.shape(1) == num_rows);
  Expect(scale.shape(1) == 1 || scale.shape(1) == num_rows);
  Expect(!zero || (zero->shape(0) == scale.shape(0) && zero->shape(1) == scale.shape(1)));
  for (size_t j = 0; j < num_rounded; ++j) Expect(tiles(j) >= 0 && static_cast<size_t>(tiles(j)) < scale.shape(0));
  const Columns work{columns.data(), num_columns, num_rounded, num_rows, upper.data(),
                              static_cast<size_t>(upper.stride(0)), scale.data(), zero ? zero->data() : nullptr,
                              scale.shape(1), tiles.data(), codes.data()};
  const nb::gil_scoped_release let_others_go_on;
  kernel(work, format);
}

}  // namespace

void BindGptq(nb::module_& m) {
  m.def("round_columns", &RoundColumns, "instruction_set"_a, "columns"_a, "num_rounded"_a, "upper"_a, "format"_a, "scale"_a,
        "zero"_a.none(), "tiles"_a, "codes"_a);
}

}  // namespace halfbin
