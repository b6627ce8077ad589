#pragma once

#include <nanobind/nanobind.h>

namespace halfbin {

// Adds the matrix products to the extension module. Pointers come as integers: taking a tensor apart costs microseconds through
// DLPack, and a product of one token is called for every layer of every token. halfbin.kernels.products checks what they point to.
void BindMatmul(nanobind::module_& m);

}  // namespace halfbin
