// Packing for AVX2.
#define HALFBIN_TARGET avx2
#define HALFBIN_PACKING_KERNELS kPackingAvx2
#include "packing/bits_inl.h"
