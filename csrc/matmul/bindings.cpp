#include "matmul/bindings.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>

#include "cpu/read.h"
#include "matmul/experts.h"
#include "matmul/mixed.h"

namespace nb = nanobind;

namespace halfbin {
namespace {

using namespace matmul;

template <class T>
T* At(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Header MakeHeader(size_t n, size_t k, size_t group_size, uint32_t bits, uint32_t scale_type, bool has_zeros, bool has_sums,
                  int32_t zero) {
  return {kMagic, bits, n, k, group_size, static_cast<Float>(scale_type), has_zeros, has_sums, zero, {}};
}

size_t PackedBytes(size_t n, size_t k, size_t group_size, uint32_t bits, uint32_t scale_type, bool has_zeros, bool has_sums) {
  return View(MakeHeader(n, k, group_size, bits, scale_type, has_zeros, has_sums, 0), nullptr).bytes;
}

void PackInto(uintptr_t codes, int32_t least, uintptr_t scales, uintptr_t zero_points, size_t n, size_t k, size_t group_size,
              uint32_t bits, uint32_t scale_type, bool has_sums, int32_t zero, nb::bytes table, uintptr_t out, size_t num_threads) {
  Header header = MakeHeader(n, k, group_size, bits, scale_type, zero_points != 0, has_sums, zero);
  std::memcpy(header.table, table.c_str(), std::min(table.size(), sizeof header.table));
  const nb::gil_scoped_release without_the_interpreter;
  Pack(header, {At<const uint8_t>(codes), least, At<const void>(scales), At<const int32_t>(zero_points)}, At<uint8_t>(out),
       num_threads);
}

// What a packed weight says of itself: n, k, groups, type of scales, whether it has zero points.
std::tuple<size_t, size_t, size_t, uint32_t, bool> Describe(uintptr_t packed) {
  const Weights w = View(*At<const Header>(packed), nullptr);
  return {w.header.n, w.header.k, w.groups, static_cast<uint32_t>(w.header.scale_type), w.header.has_zeros != 0};
}

void UnpackInto(uintptr_t packed, uintptr_t codes, int32_t least, uintptr_t scales, uintptr_t zero_points, size_t num_threads) {
  Unpack(View(*At<const Header>(packed), At<const uint8_t>(packed)),
         {At<uint8_t>(codes), least, At<void>(scales), At<int32_t>(zero_points)}, num_threads);
}

// The number of tokens that are not finite; -1: nothing of this name; -2: the weight has other columns than x.
int64_t Multiply(uintptr_t packed, uintptr_t x, bool x_is_bfloat16, size_t m, size_t columns, bool by_group, bool symmetric, int32_t qmin,
                 int32_t qmax, uintptr_t scale, uintptr_t zero_point, uintptr_t bias, bool bias_is_bfloat16, uintptr_t y,
                 std::optional<const char*> set_name, size_t num_threads) {
  const InstructionSet* set = Find(set_name.value_or(nullptr), m);
  if (set == nullptr) return -1;
  if (At<const Header>(packed)->k != columns) return -2;
  using Scales = InputGrid::Scales;
  InputGrid grid{by_group ? Scales::kTokenAndGroup : scale == 0 ? Scales::kToken : Scales::kStatic, symmetric, qmin, qmax, 0, 0};
  if (scale != 0) grid.scale = *At<const float>(scale);
  if (zero_point != 0) grid.zero_point = *At<const int32_t>(zero_point);
  const auto type = [](bool narrow) { return narrow ? Float::kBfloat16 : Float::kFloat32; };
  Linear linear{View(*At<const Header>(packed), At<const uint8_t>(packed)),
                {At<const void>(x), type(x_is_bfloat16)},
                m,
                grid,
                {At<const void>(bias), type(bias_is_bfloat16)},
                At<void>(y),
                type(x_is_bfloat16)};
  const nb::gil_scoped_release without_the_interpreter;
  return static_cast<int64_t>(Run(linear, *set, num_threads));
}

// The number of inputs that are not finite, or -1: nothing of this name.
int64_t MultiplyMixed(uintptr_t packed, uintptr_t x, bool x_is_bfloat16, size_t m, float threshold, uintptr_t ids, uintptr_t values,
                      uint32_t values_type, size_t count, uintptr_t bias, bool bias_is_bfloat16, uintptr_t y,
                      std::optional<const char*> set_name, size_t num_threads) {
  const InstructionSet* set = Find(set_name.value_or(nullptr), m);
  if (set == nullptr) return -1;
  const auto type = [](bool narrow) { return narrow ? Float::kBfloat16 : Float::kFloat32; };
  const Linear linear{View(*At<const Header>(packed), At<const uint8_t>(packed)),
                      {At<const void>(x), type(x_is_bfloat16)},
                      m,
                      {InputGrid::Scales::kToken, true, -128, 127, 0, 0},
                      {At<const void>(bias), type(bias_is_bfloat16)},
                      At<void>(y),
                      type(x_is_bfloat16)};
  const nb::gil_scoped_release without_the_interpreter;
  const FloatColumns columns{threshold, At<const int32_t>(ids), {At<const void>(values), static_cast<Float>(values_type)}, count};
  return static_cast<int64_t>(RunMixed(linear, columns, *set, num_threads));
}

// The number of tokens that are not finite; -1: nothing of this name; -2 - i: `chosen` names no expert at i.
int64_t MultiplyExperts(uintptr_t packed, size_t count, size_t stride, uintptr_t x, bool x_is_bfloat16, size_t m, uintptr_t chosen,
                        size_t slots, bool symmetric, bool by_group, int32_t qmin, int32_t qmax, uintptr_t bias, bool bias_is_bfloat16,
                        uintptr_t y, std::optional<const char*> set_name, size_t num_threads) {
  if (Find(set_name.value_or(nullptr), m) == nullptr) return -1;
  using Scales = InputGrid::Scales;
  const auto type = [](bool narrow) { return narrow ? Float::kBfloat16 : Float::kFloat32; };
  const Experts experts{At<const uint8_t>(packed),
                        count,
                        stride,
                        {At<const void>(x), type(x_is_bfloat16)},
                        m,
                        At<const int64_t>(chosen),
                        slots,
                        {by_group ? Scales::kTokenAndGroup : Scales::kToken, symmetric, qmin, qmax, 0, 0},
                        {At<const void>(bias), type(bias_is_bfloat16)},
                        At<void>(y),
                        type(x_is_bfloat16)};
  const nb::gil_scoped_release without_the_interpreter;
  if (const int64_t unknown = FirstUnknown(experts); unknown >= 0) return -2 - unknown;
  return static_cast<int64_t>(RunExperts(experts, set_name.value_or(nullptr), num_threads));
}

}  // namespace

void BindMatmul(nb::module_& m) {
  m.def("streaming_read", [](uintptr_t memory, size_t bytes, size_t num_threads) {
    return StreamingRead(At<const uint8_t>(memory), bytes, num_threads);
  }, nb::call_guard<nb::gil_scoped_release>(), "The sum of the 64-bit words of some memory: what reading it costs.");
  m.def("matmul_sets", &InstructionSets, "Instruction sets that products run on here, the preferred one first.");
  m.def("matmul_packed_bytes", &PackedBytes, "Bytes of a packed weight.");
  m.def("matmul_pack", &PackInto, "Fill the memory of a packed weight.");
  m.def("matmul_describe", &Describe, "Sizes and types of a packed weight.");
  m.def("matmul_unpack", &UnpackInto, nb::call_guard<nb::gil_scoped_release>(), "The codes, scales and zero points that were packed.");
  // Without names of arguments, nanobind takes its short way of calling: each product of a decoded token is a call.
  m.def("matmul", &Multiply,
        "x_hat @ w_hat.T + bias; returns the number of tokens that are not finite.");
  m.def("matmul_mixed", &MultiplyMixed, nb::arg("packed"), nb::arg("x"), nb::arg("x_is_bfloat16"), nb::arg("m"), nb::arg("threshold"),
        nb::arg("ids"), nb::arg("values"), nb::arg("values_type"), nb::arg("count"), nb::arg("bias"), nb::arg("bias_is_bfloat16"),
        nb::arg("y"), nb::arg("set").none(), nb::arg("num_threads"),
        "The same with columns of outliers in floats; returns the number of inputs that are not finite.");
  m.def("matmul_experts", &MultiplyExperts,
        "The products of each token with the experts chosen for it; returns the number of tokens that are not finite.");
}

}  // namespace halfbin
