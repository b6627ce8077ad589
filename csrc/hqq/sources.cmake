# HQQ's alternation.
target_sources(halfbin_kernels PRIVATE hqq/solve.cpp)
halfbin_on_lanes(hqq)
