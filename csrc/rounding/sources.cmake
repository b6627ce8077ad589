# Rounding to nearest, error sums, the search for ranges.
target_sources(halfbin_kernels PRIVATE rounding/rounding.cpp)
halfbin_on_lanes(rounding)
