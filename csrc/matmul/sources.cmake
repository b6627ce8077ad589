# The matrix products: what every processor compiles, and one file for each instruction set of x86-64.
target_sources(halfbin_kernels PRIVATE cpu/read.cpp matmul/weights.cpp matmul/inputs.cpp matmul/linear.cpp matmul/mixed.cpp
               matmul/portable.cpp)
set(matmul_sets avx2 avx_vnni avx512_vnni amx_int8)
set(matmul_avx2 -mavx2 -mfma -mf16c)
set(matmul_avx_vnni ${matmul_avx2} -mavxvnni)
set(matmul_avx512_vnni ${matmul_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mprefer-vector-width=512)
set(matmul_amx_int8 ${matmul_avx512_vnni} -mamx-tile -mamx-int8)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  foreach(set ${matmul_sets})
    target_sources(halfbin_kernels PRIVATE matmul/${set}.cpp)
    set_source_files_properties(matmul/${set}.cpp PROPERTIES COMPILE_OPTIONS "${matmul_${set}}")
  endforeach()
else()
  target_sources(halfbin_kernels PRIVATE matmul/no_x86.cpp)
endif()
# These change no value; without them the loops in steps.h do not become vector instructions.
target_compile_options(halfbin_kernels PRIVATE -fno-trapping-math -fno-math-errno)
