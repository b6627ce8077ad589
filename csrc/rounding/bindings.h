// The rounding, packing and comparing of `halfbin.kernels`, for Python.
#pragma once

#include <nanobind/nanobind.h>

void BindRounding(nanobind::module_& m);
