#include "checksum/bindings.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <string>

#include "checksum/crc32.h"

namespace halfbin {
namespace {

namespace nb = nanobind;
using nb::literals::operator""_a;

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

uint32_t Checksum(const std::string& instruction_set, const Bytes& data, uint32_t before) {
  const Crc32Kernel kernel = Crc32Of(instruction_set.c_str());
  if (kernel == nullptr) throw nb::value_error("no such instruction set in this build");
  const nb::gil_scoped_release let_others_go_on;
  return Crc32(kernel, before, data.data(), data.size());
}

}  // namespace

void BindChecksum(nb::module_& m) { m.def("crc32", &Checksum, "instruction_set"_a, "data"_a, "before"_a); }

}  // namespace halfbin
