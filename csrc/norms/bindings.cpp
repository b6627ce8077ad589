#include "norms/bindings.h"

#include <cstdint>

#include "arrays.h"
#include "norms/norms.h"

namespace halfbin {
namespace {

namespace nb = nanobind;

void Norm(const char* instruction_set, uintptr_t x, uintptr_t weight, uintptr_t y, size_t m, size_t n, float eps, bool one_plus,
          bool bfloat16, size_t num_threads) {
  const RmsNormKernel kernel = RmsNormOf(instruction_set);
  Expect(kernel != nullptr);
  const auto at = [](uintptr_t address) { return reinterpret_cast<void*>(address); };
  const nb::gil_scoped_release let_others_go_on;
  RunRmsNorm(kernel, {at(x), at(weight), at(y), m, n, eps, one_plus, bfloat16}, num_threads);
}

}  // namespace

void BindNorms(nb::module_& m) {
  m.def("rms_norm", &Norm, "RMS norm of rows; addresses of float32 or bfloat16.");
}

}  // namespace halfbin
