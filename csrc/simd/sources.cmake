# Files of a room that are the same source on sixteen lanes, for any processor and for each instruction set that has lanes.
set(lanes_avx2 -mavx2 -mfma -mf16c)
# gcc 12 takes the undefined registers of its own AVX-512 header for mistakes of ours (gcc bug 105593).
set(lanes_avx512 ${lanes_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -Wno-uninitialized -Wno-maybe-uninitialized)
function(halfbin_on_lanes room)
  target_sources(halfbin_kernels PRIVATE ${room}/portable.cpp)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    foreach(set avx2 avx512)
      target_sources(halfbin_kernels PRIVATE ${room}/${set}.cpp)
      set_source_files_properties(${room}/${set}.cpp PROPERTIES COMPILE_OPTIONS "${lanes_${set}}")
    endforeach()
  endif()
endfunction()
