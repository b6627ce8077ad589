// What Python sees of the norms.
#pragma once

#include <nanobind/nanobind.h>

namespace halfbin {

void BindNorms(nanobind::module_& m);

}  // namespace halfbin
