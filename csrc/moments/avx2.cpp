// Second moments for AVX2 with FMA.
#define HALFBIN_TARGET avx2
#define HALFBIN_SYRK kSyrkAvx2
#define HALFBIN_TILE_HIGH 6
#define HALFBIN_TILE_WIDE 1
#include "simd/lanes_avx2.h"
// The lanes come first.
#include "moments/syrk_inl.h"
