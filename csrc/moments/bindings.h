// What Python sees of second moments.
#pragma once

#include <nanobind/nanobind.h>

namespace halfbin {

void BindMoments(nanobind::module_& m);

}  // namespace halfbin
