// Norms for any processor.
#define HALFBIN_TARGET portable
#define HALFBIN_RMS_NORM kRmsNormPortable
#include "simd/lanes_portable.h"
// The lanes come first.
#include "norms/norms_inl.h"
