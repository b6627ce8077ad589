// What Python sees of the products with weights whose codes stand for floats.
#pragma once

#include <nanobind/nanobind.h>

namespace halfbin {

void BindFloats(nanobind::module_& m);

}  // namespace halfbin
