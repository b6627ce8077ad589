# Norms.
target_sources(halfbin_kernels PRIVATE norms/norms.cpp)
halfbin_on_lanes(norms)
