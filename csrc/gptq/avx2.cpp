// GPTQ's loop over columns for AVX2 with FMA and F16C.
#define HALFBIN_TARGET avx2
#define HALFBIN_ROUND_COLUMNS kRoundColumnsAvx2
#include "simd/lanes_avx2.h"
// The lanes come first.
#include "rounding/scales_inl.h"
// Then what is made of them.
#include "gptq/columns_inl.h"
