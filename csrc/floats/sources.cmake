# Products of floats with weights whose codes stand for floats.
target_sources(halfbin_kernels PRIVATE floats/weights.cpp floats/linear.cpp)
halfbin_on_lanes(floats)
