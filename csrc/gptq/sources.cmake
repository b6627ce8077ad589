# GPTQ's loop over columns.
target_sources(halfbin_kernels PRIVATE gptq/columns.cpp)
halfbin_on_lanes(gptq)
