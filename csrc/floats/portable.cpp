// Products of floats for any processor.
#define HALFBIN_TARGET portable
#define HALFBIN_NAME "portable"
#define HALFBIN_FLOATS kPortable
#define HALFBIN_DIRECT_TOKENS 1
#define HALFBIN_VECTORS 4
#define HALFBIN_TILE_VECTORS 2
#include "simd/lanes_portable.h"
// The lanes come first.
#include "floats/product_inl.h"
