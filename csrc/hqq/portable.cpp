// HQQ's alternation for any processor.
#define HALFBIN_TARGET portable
#define HALFBIN_SOLVE_HQQ kSolveHqqPortable
#include "simd/lanes_portable.h"
// The lanes come first.
#include "rounding/scales_inl.h"
// Then what is made of them.
#include "hqq/solve_inl.h"
