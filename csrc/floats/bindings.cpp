// Pointers come as integers, as in matmul/bindings.h, with the number of bytes behind them; halfbin.kernels.float_products checks types.
#include "floats/bindings.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "arrays.h"
#include "floats/linear.h"

namespace halfbin {
namespace {

namespace nb = nanobind;
using namespace floats;

template <class T>
T* At(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Sizes that View can compute with.
void ExpectSound(const Header& h) {
  Expect(h.kind <= Kind::kE5m2 && h.scale_type <= Float::kBfloat16);
  Expect(h.n > 0 && h.k > 0 && h.group_size > 0 && (h.group_size >= h.k || h.group_size % kColumnStep == 0));
}

Header MakeHeader(uint32_t kind, size_t n, size_t k, size_t group_size, uint32_t scale_type) {
  const Header header{kMagic, static_cast<Kind>(kind), n, k, group_size, static_cast<Float>(scale_type), 0, 0, 0, {}};
  ExpectSound(header);
  return header;
}

// A packed weight of `bytes` bytes, if it is one.
Weights Open(uintptr_t packed, size_t bytes) {
  Expect(bytes >= kHeaderBytes && packed % alignof(Header) == 0);
  const Header& header = *At<const Header>(packed);
  Expect(header.magic == kMagic);
  ExpectSound(header);
  const Weights w = View(header, At<const uint8_t>(packed));
  Expect(w.bytes == bytes);
  return w;
}

const InstructionSet& Set(const std::string& name) {
  const InstructionSet* set = Find(name.c_str());
  Expect(set != nullptr);
  return *set;
}

size_t PackedBytes(uint32_t kind, size_t n, size_t k, size_t group_size, uint32_t scale_type) {
  return View(MakeHeader(kind, n, k, group_size, scale_type), nullptr).bytes;
}

// The number of codes that are none of the table's.
size_t PackInto(uint32_t kind, const std::vector<float>& table, uintptr_t codes, uintptr_t scales, size_t n, size_t k, size_t group_size,
                uint32_t scale_type, uintptr_t out, size_t num_threads) {
  Header header = MakeHeader(kind, n, k, group_size, scale_type);
  Expect(table.size() <= 16 && (header.kind == Kind::kTable) == !table.empty());
  std::copy(table.begin(), table.end(), header.table);
  header.num_values = static_cast<uint32_t>(table.size());
  const nb::gil_scoped_release let_others_go_on;
  return Pack(header, {At<const uint8_t>(codes), At<const void>(scales)}, At<uint8_t>(out), num_threads);
}

// n, k, groups, type of scales, kind.
std::tuple<size_t, size_t, size_t, uint32_t, uint32_t> Describe(uintptr_t packed, size_t bytes) {
  const Weights w = Open(packed, bytes);
  return {w.header.n, w.header.k, w.groups, static_cast<uint32_t>(w.header.scale_type), static_cast<uint32_t>(w.header.kind)};
}

void UnpackInto(uintptr_t packed, size_t bytes, uintptr_t codes, uintptr_t scales, size_t num_threads) {
  const Weights w = Open(packed, bytes);
  const nb::gil_scoped_release let_others_go_on;
  Unpack(w, {At<uint8_t>(codes), At<void>(scales)}, num_threads);
}

void Multiply(uintptr_t packed, size_t bytes, uintptr_t x, bool x_is_bfloat16, size_t m, size_t k, uintptr_t bias, bool bias_is_bfloat16,
              uintptr_t y, size_t n, const std::string& set_name, size_t num_threads) {
  const Weights w = Open(packed, bytes);
  Expect(w.header.n == n && w.header.k == k);
  const InstructionSet& set = Set(set_name);
  const auto type = [](bool narrow) { return narrow ? Float::kBfloat16 : Float::kFloat32; };
  const Linear linear{w, {At<const void>(x), type(x_is_bfloat16)}, m, {At<const void>(bias), type(bias_is_bfloat16)}, At<void>(y)};
  const nb::gil_scoped_release let_others_go_on;
  Run(linear, set, num_threads);
}

void DequantizeInto(uintptr_t packed, size_t bytes, size_t first, size_t last, uintptr_t out, size_t numbers, bool to_bfloat16,
                    const std::string& set_name, size_t num_threads) {
  const Weights w = Open(packed, bytes);
  Expect(first < last && last <= w.num_panels && numbers >= (last - first) * kPanelRows * w.header.k);
  const InstructionSet& set = Set(set_name);
  const nb::gil_scoped_release let_others_go_on;
  Dequantize(w, first, last, to_bfloat16 ? Float::kBfloat16 : Float::kFloat32, At<void>(out), set, num_threads);
}

}  // namespace

void BindFloats(nb::module_& m) {
  m.def("floats_packed_bytes", &PackedBytes, "Bytes of a packed weight.");
  m.def("floats_pack", &PackInto, "Fill the memory of a packed weight; returns how many codes are none of the table's.");
  m.def("floats_describe", &Describe, "Sizes and types of a packed weight.");
  m.def("floats_unpack", &UnpackInto, "The codes and scales that were packed.");
  m.def("floats_multiply", &Multiply, "x @ w_hat.T + bias.");
  m.def("floats_dequantize", &DequantizeInto, "w_hat.T of some panels.");
}

}  // namespace halfbin
