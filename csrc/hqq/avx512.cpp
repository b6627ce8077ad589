// HQQ's alternation for AVX-512 F, BW, DQ, VL.
#define HALFBIN_TARGET avx512
#define HALFBIN_SOLVE_HQQ kSolveHqqAvx512
#include "simd/lanes_avx512.h"
// The lanes come first.
#include "rounding/scales_inl.h"
// Then what is made of them.
#include "hqq/solve_inl.h"
