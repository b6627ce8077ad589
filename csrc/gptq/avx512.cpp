// GPTQ's loop over columns for AVX-512 F, BW, DQ, VL.
#define HALFBIN_TARGET avx512
#define HALFBIN_ROUND_COLUMNS kRoundColumnsAvx512
#include "simd/lanes_avx512.h"
// The lanes come first.
#include "rounding/scales_inl.h"
// Then what is made of them.
#include "gptq/columns_inl.h"
