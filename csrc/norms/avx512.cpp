// Norms for AVX-512 F, BW, DQ, VL.
#define HALFBIN_TARGET avx512
#define HALFBIN_RMS_NORM kRmsNormAvx512
#include "simd/lanes_avx512.h"
// The lanes come first.
#include "norms/norms_inl.h"
