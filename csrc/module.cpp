// The extension module halfbin.kernels._native: what Python sees of the compiled loops. Each binding checks dtype, shape and
// contiguity in its signature; the loops themselves check nothing, throw nothing and print nothing.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "checksum/bindings.h"
#include "cpu/features.h"
#include "cpu/threads.h"
#include "floats/bindings.h"
#include "gptq/bindings.h"
#include "hqq/bindings.h"
#include "matmul/bindings.h"
#include "moments/bindings.h"
#include "norms/bindings.h"
#include "packing/bindings.h"
#include "rounding/bindings.h"

namespace nb = nanobind;

NB_MODULE(_native, m) {
  m.doc() = "Compiled loops on plain arrays.";
  // Formats and rules are kept by caches to the very end of the program; nanobind would call that a leak, on everybody's stderr.
  nb::set_leak_warnings(false);
  halfbin::BindChecksum(m);
  halfbin::BindRounding(m);  // first, as formats of codes are arguments of the others
  halfbin::BindFloats(m);
  halfbin::BindGptq(m);
  halfbin::BindHqq(m);
  halfbin::BindMoments(m);
  halfbin::BindNorms(m);
  halfbin::BindPacking(m);
  m.def("cpu_features", &halfbin::CpuFeatures, "Names of the instruction sets that this machine can run.");
  m.def("use_openmp", [](uintptr_t gomp_parallel) { halfbin::UseOpenMp(reinterpret_cast<halfbin::GompParallel>(gomp_parallel)); },
        "Share work out by the function GOMP_parallel at this address; 0: by a pool of threads of our own.");
  m.def("uses_openmp", &halfbin::UsesOpenMp, "Whether work is shared out by OpenMP.");
  halfbin::BindMatmul(m);
}
