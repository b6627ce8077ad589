#include "packing/bindings.h"

#include <nanobind/stl/string.h>

#include <string>

#include "arrays.h"
#include "packing/bits.h"

namespace halfbin {
namespace {

namespace nb = nanobind;
using nb::literals::operator""_a;

const PackingKernels& Packing(const std::string& instruction_set) {
  const PackingKernels* const kernels = PackingKernelsOf(instruction_set.c_str());
  Expect(kernels != nullptr);
  return *kernels;
}

bool Pack(const std::string& set, Matrix<const uint8_t> codes, int bits, int lowest, Matrix<uint8_t> packed,
          size_t num_threads) {
  Expect(bits >= 1 && bits <= 8 && packed.shape(0) == codes.shape(0));
  Expect(packed.shape(1) >= PackedSize(codes.shape(1), bits));
  const nb::gil_scoped_release let_others_go_on;
  return PackRows(Packing(set), codes.data(), codes.shape(0), codes.shape(1), bits, static_cast<uint8_t>(lowest),
                  packed.data(), packed.shape(1), num_threads);
}

void Unpack(const std::string& set, Matrix<const uint8_t> packed, int bits, int lowest, Matrix<uint8_t> codes,
            size_t num_threads) {
  Expect(bits >= 1 && bits <= 8 && packed.shape(0) == codes.shape(0));
  Expect(packed.shape(1) >= PackedSize(codes.shape(1), bits));
  const nb::gil_scoped_release let_others_go_on;
  UnpackRows(Packing(set), packed.data(), packed.shape(1), codes.shape(0), codes.shape(1), bits,
             static_cast<uint8_t>(lowest), codes.data(), num_threads);
}

}  // namespace

void BindPacking(nb::module_& m) {
  m.def("pack_rows", &Pack, "instruction_set"_a, "codes"_a, "bits"_a, "lowest"_a, "packed"_a, "num_threads"_a);
  m.def("unpack_rows", &Unpack, "instruction_set"_a, "packed"_a, "bits"_a, "lowest"_a, "codes"_a, "num_threads"_a);
}

}  // namespace halfbin
