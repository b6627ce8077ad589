# Second moments.
target_sources(halfbin_kernels PRIVATE moments/syrk.cpp)
halfbin_on_lanes(moments)
