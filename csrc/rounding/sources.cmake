# Rounding, packing, GPTQ's columns, HQQ's alternation: the same source for each instruction set.
target_sources(
  halfbin_kernels PRIVATE gptq/columns.cpp gptq/portable.cpp hqq/solve.cpp hqq/portable.cpp packing/bits.cpp
                          packing/portable.cpp rounding/rounding.cpp rounding/portable.cpp
)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(avx2 -mavx2 -mfma -mf16c)
  # gcc 12 takes the undefined registers of its own AVX-512 header for mistakes of ours (gcc bug 105593).
  set(avx512 ${avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -Wno-uninitialized -Wno-maybe-uninitialized)
  foreach(room gptq hqq packing rounding)
    target_sources(halfbin_kernels PRIVATE ${room}/avx2.cpp ${room}/avx512.cpp)
    set_source_files_properties(${room}/avx2.cpp PROPERTIES COMPILE_OPTIONS "${avx2}")
    set_source_files_properties(${room}/avx512.cpp PROPERTIES COMPILE_OPTIONS "${avx512}")
  endforeach()
endif()
