// Products of floats for AVX2 with FMA and F16C.
#define HALFBIN_TARGET avx2
#define HALFBIN_NAME "avx2"
#define HALFBIN_FLOATS kAvx2
#define HALFBIN_DIRECT_TOKENS 1
#define HALFBIN_VECTORS 4
#define HALFBIN_TILE_VECTORS 1
#include "simd/lanes_avx2.h"
// The lanes come first.
#include "floats/product_inl.h"
