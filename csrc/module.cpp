// The extension module halfbin.kernels._native: what Python sees of the compiled loops. Each binding checks dtype, shape and
// contiguity in its signature; the loops themselves check nothing, throw nothing and print nothing.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "cpu/features.h"
#include "cpu/streaming.h"
#include "matmul/bindings.h"

namespace nb = nanobind;

NB_MODULE(_native, m) {
  m.doc() = "Compiled loops on plain arrays.";
  m.def("cpu_features", &halfbin::CpuFeatures, "Names of the instruction sets that this machine can run.");
  m.def(
      "read_once",
      [](nb::ndarray<const uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> words, size_t num_threads) {
        const uint64_t* data = words.data();
        const size_t num_words = words.size();
        const nb::gil_scoped_release released;
        return halfbin::ReadOnce(data, num_words, num_threads);
      },
      nb::arg("words").noconvert(), nb::arg("num_threads"), "The sum of all words: one pass over their memory.");
  halfbin::BindMatmul(m);
}
