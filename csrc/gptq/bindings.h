// What Python sees of GPTQ's loop over columns.
#pragma once

#include <nanobind/nanobind.h>

namespace halfbin {

void BindGptq(nanobind::module_& m);

}  // namespace halfbin
