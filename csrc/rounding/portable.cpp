// Rounding for any processor.
#define HALFBIN_TARGET portable
#define HALFBIN_ROUNDING_KERNELS kRoundingPortable
#define HALFBIN_PACKING_KERNELS kPackingPortable
#include <type_traits>

#include "simd/lanes_portable.h"
// The lanes come first.
#include "rounding/scales_inl.h"
// Then what is made of them.
#include "rounding/kernels_inl.h"
