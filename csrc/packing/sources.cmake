# Packing and unpacking.
target_sources(halfbin_kernels PRIVATE packing/bits.cpp)
halfbin_on_lanes(packing)
