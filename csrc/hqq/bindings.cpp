#include "hqq/bindings.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <string>

#include "arrays.h"
#include "hqq/solve.h"

namespace halfbin {
namespace {

namespace nb = nanobind;
using nb::literals::operator""_a;

void Solve(const std::string& set, Matrix<const float> tiles, const CodeFormat& format, ScaleType stored,
              Flat<float> scale, std::optional<Flat<int32_t>> zero, int iterations, float p, double beta, double growth,
              size_t num_threads) {
  const SolveHqqKernel kernel = SolveHqqOf(set.c_str());
  Expect(kernel != nullptr && scale.shape(0) == tiles.shape(0) && (!zero || zero->shape(0) == tiles.shape(0)));
  const HqqTiles work{tiles.data(), tiles.shape(0), tiles.shape(1), scale.data(), zero ? zero->data() : nullptr};
  const nb::gil_scoped_release let_others_go_on;
  SolveHqq(kernel, work, format, stored, {iterations, p, beta, growth}, num_threads);
}

}  // namespace

void BindHqq(nb::module_& m) {
  m.def("solve_hqq", &Solve, "instruction_set"_a, "tiles"_a, "format"_a, "stored"_a, "scale"_a, "zero"_a.none(),
        "iterations"_a, "p"_a, "beta"_a, "growth"_a, "num_threads"_a);
}

}  // namespace halfbin
