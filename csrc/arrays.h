// Arrays as the bindings take them from Python.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

namespace halfbin {

template <class T>
using Matrix = nanobind::ndarray<T, nanobind::ndim<2>, nanobind::c_contig, nanobind::device::cpu>;
template <class T>
using Flat = nanobind::ndarray<T, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;

inline void Expect(bool fits) {
  if (!fits) throw nanobind::value_error("shapes or instruction set do not fit");
}

}  // namespace halfbin
