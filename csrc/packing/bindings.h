// What Python sees of packing.
#pragma once

#include <nanobind/nanobind.h>

namespace halfbin {

void BindPacking(nanobind::module_& m);

}  // namespace halfbin
