// Rounding for AVX2 with FMA and F16C.
#define HALFBIN_TARGET avx2
#define HALFBIN_ROUNDING_KERNELS kRoundingAvx2
#define HALFBIN_PACKING_KERNELS kPackingAvx2
#include <type_traits>

#include "simd/lanes_avx2.h"
// The lanes come first.
#include "rounding/scales_inl.h"
// Then what is made of them.
#include "rounding/kernels_inl.h"
