// Rounding for AVX-512 F, BW, DQ, VL.
#define HALFBIN_TARGET avx512
#define HALFBIN_ROUNDING_KERNELS kRoundingAvx512
#define HALFBIN_PACKING_KERNELS kPackingAvx512
#include <type_traits>

#include "simd/lanes_avx512.h"
// The lanes come first.
#include "rounding/scales_inl.h"
// Then what is made of them.
#include "rounding/kernels_inl.h"
