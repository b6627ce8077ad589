// Second moments for any processor.
#define HALFBIN_TARGET portable
#define HALFBIN_SYRK kSyrkPortable
#define HALFBIN_TILE_HIGH 6
#define HALFBIN_TILE_WIDE 1
#include "simd/lanes_portable.h"
// The lanes come first.
#include "moments/syrk_inl.h"
