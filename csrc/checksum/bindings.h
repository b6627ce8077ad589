// What Python sees of the checksums.
#pragma once

#include <nanobind/nanobind.h>

namespace halfbin {

void BindChecksum(nanobind::module_& m);

}  // namespace halfbin
