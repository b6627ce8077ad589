// Norms for AVX2 with FMA.
#define HALFBIN_TARGET avx2
#define HALFBIN_RMS_NORM kRmsNormAvx2
#include "simd/lanes_avx2.h"
// The lanes come first.
#include "norms/norms_inl.h"
