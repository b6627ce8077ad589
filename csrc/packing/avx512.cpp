// Packing for AVX-512 F, BW, DQ, VL.
#define HALFBIN_TARGET avx512
#define HALFBIN_PACKING_KERNELS kPackingAvx512
#include "packing/bits_inl.h"
