// What Python sees of HQQ's alternation.
#pragma once

#include <nanobind/nanobind.h>

namespace halfbin {

void BindHqq(nanobind::module_& m);

}  // namespace halfbin
