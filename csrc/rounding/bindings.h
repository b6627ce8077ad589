// What Python sees of rounding, error sums, the search for ranges, and the formats of codes.
#pragma once

#include <nanobind/nanobind.h>

namespace halfbin {

void BindRounding(nanobind::module_& m);

}  // namespace halfbin
