// GPTQ's loop over columns for any processor.
#define HALFBIN_TARGET portable
#define HALFBIN_ROUND_COLUMNS kRoundColumnsPortable
#include "simd/lanes_portable.h"
// The lanes come first.
#include "rounding/scales_inl.h"
// Then what is made of them.
#include "gptq/columns_inl.h"
