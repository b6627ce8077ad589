// The extension module halfbin.kernels._native: what Python sees of the compiled loops. Each binding checks dtype, shape and
// contiguity in its signature; the loops themselves check nothing, throw nothing and print nothing.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "checksum/bindings.h"
#include "cpu/features.h"
#include "matmul/bindings.h"
#include "rounding/bindings.h"

namespace nb = nanobind;

NB_MODULE(_native, m) {
  m.doc() = "Compiled loops on plain arrays.";
  halfbin::BindChecksum(m);
  BindRounding(m);
  m.def("cpu_features", &halfbin::CpuFeatures, "Names of the instruction sets that this machine can run.");
  halfbin::BindMatmul(m);
}
