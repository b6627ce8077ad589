#include "moments/bindings.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstddef>
#include <string>
#include <vector>

#include "arrays.h"
#include "moments/syrk.h"

namespace halfbin {
namespace {

namespace nb = nanobind;
using nb::literals::operator""_a;

SyrkKernel Kernel(const std::string& instruction_set) {
  const SyrkKernel kernel = SyrkOf(instruction_set.c_str());
  Expect(kernel != nullptr);
  return kernel;
}

Sample SampleOf(const Matrix<const float>& x) { return {x.data(), x.shape(0), x.shape(1)}; }

void AddStrips(const std::string& set, const Matrix<const float>& x, const std::vector<Matrix<double>>& sums,
               size_t num_threads) {
  const SyrkKernel kernel = Kernel(set);
  std::vector<Strip> strips;
  size_t first = 0;
  for (const Matrix<double>& sum : sums) {
    Expect(first + sum.shape(0) <= x.shape(1) && sum.shape(1) == x.shape(1) - first);
    strips.push_back({first, sum.shape(0), sum.data()});
    first += sum.shape(0);
  }
  const nb::gil_scoped_release let_others_go_on;
  AddToStrips(kernel, SampleOf(x), strips.data(), strips.size(), num_threads);
}

void Upper(const std::string& set, const Matrix<const float>& x, const Matrix<float>& product, size_t num_threads) {
  const SyrkKernel kernel = Kernel(set);
  Expect(product.shape(0) == x.shape(1) && product.shape(1) == x.shape(1));
  const nb::gil_scoped_release let_others_go_on;
  UpperProduct(kernel, SampleOf(x), product.data(), num_threads);
}

}  // namespace

void BindMoments(nb::module_& m) {
  m.def("add_to_strips", &AddStrips, "instruction_set"_a, "x"_a, "sums"_a, "num_threads"_a);
  m.def("upper_product", &Upper, "instruction_set"_a, "x"_a, "product"_a, "num_threads"_a);
}

}  // namespace halfbin
