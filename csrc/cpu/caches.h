// How large this processor's caches are.
#pragma once

#include <cstddef>

namespace halfbin {

// Bytes of a core's second cache; 1 MiB where the system does not say.
size_t SecondCacheBytes();

}  // namespace halfbin
