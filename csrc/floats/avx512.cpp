// Products of floats for AVX-512 F, BW, DQ, VL.
#define HALFBIN_TARGET avx512
#define HALFBIN_NAME "avx512"
#define HALFBIN_FLOATS kAvx512
#define HALFBIN_DIRECT_TOKENS 6
#define HALFBIN_VECTORS 4
#define HALFBIN_TILE_VECTORS 4
#include "simd/lanes_avx512.h"
// The lanes come first.
#include "floats/product_inl.h"
