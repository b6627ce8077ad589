# Rounding, packing, searching ranges: the same source for each instruction set.
target_sources(
  halfbin_kernels PRIVATE packing/bits.cpp packing/portable.cpp rounding/rounding.cpp rounding/portable.cpp
)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(avx2 -mavx2 -mfma -mf16c)
  # gcc 12 takes the undefined registers of its own AVX-512 header for mistakes of ours (gcc bug 105593).
  set(avx512 ${avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -Wno-uninitialized -Wno-maybe-uninitialized)
  target_sources(halfbin_kernels PRIVATE packing/avx2.cpp packing/avx512.cpp rounding/avx2.cpp rounding/avx512.cpp)
  set_source_files_properties(packing/avx2.cpp rounding/avx2.cpp PROPERTIES COMPILE_OPTIONS "${avx2}")
  set_source_files_properties(packing/avx512.cpp rounding/avx512.cpp PROPERTIES COMPILE_OPTIONS "${avx512}")
endif()
