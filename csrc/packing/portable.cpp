// Packing for any processor.
#define HALFBIN_TARGET portable
#define HALFBIN_PACKING_KERNELS kPackingPortable
#include "packing/bits_inl.h"
