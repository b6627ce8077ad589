// HQQ's alternation for AVX2 with FMA and F16C.
#define HALFBIN_TARGET avx2
#define HALFBIN_SOLVE_HQQ kSolveHqqAvx2
#include "simd/lanes_avx2.h"
// The lanes come first.
#include "rounding/scales_inl.h"
// Then what is made of them.
#include "hqq/solve_inl.h"
