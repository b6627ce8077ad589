// Second moments for AVX-512 F, BW, DQ, VL.
#define HALFBIN_TARGET avx512
#define HALFBIN_SYRK kSyrkAvx512
#define HALFBIN_TILE_HIGH 8
#define HALFBIN_TILE_WIDE 3
#include "simd/lanes_avx512.h"
// The lanes come first.
#include "moments/syrk_inl.h"
