# The matrix products: what every processor compiles, and one file for each instruction set of x86-64 and of 64-bit Arm.
target_sources(halfbin_kernels PRIVATE cpu/read.cpp matmul/weights.cpp matmul/inputs.cpp matmul/linear.cpp matmul/experts.cpp
               matmul/mixed.cpp matmul/portable.cpp)
set(matmul_sets_x86 avx2 avx_vnni avx512_vnni amx_int8)
set(matmul_avx2 -mavx2 -mfma -mf16c)
set(matmul_avx_vnni ${matmul_avx2} -mavxvnni)
set(matmul_avx512_vnni ${matmul_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mprefer-vector-width=512
    -Wno-uninitialized -Wno-maybe-uninitialized)  # of gcc 12's own intrinsics, its bug 105593
set(matmul_amx_int8 ${matmul_avx512_vnni} -mamx-tile -mamx-int8)
# gcc 12 orders the loads of these loops so early that sums leave their registers: up to 35 times a turn, hence without.
set(matmul_sets_arm neon_dotprod neon_i8mm)
set(matmul_order $<$<CXX_COMPILER_ID:GNU>:-fno-schedule-insns>)
set(matmul_neon_dotprod -march=armv8.2-a+dotprod ${matmul_order})
set(matmul_neon_i8mm -march=armv8.2-a+dotprod+i8mm ${matmul_order})
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(matmul_sets ${matmul_sets_x86})
  target_sources(halfbin_kernels PRIVATE matmul/no_arm.cpp)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
  set(matmul_sets ${matmul_sets_arm})
  target_sources(halfbin_kernels PRIVATE matmul/no_x86.cpp)
else()
  set(matmul_sets)
  target_sources(halfbin_kernels PRIVATE matmul/no_x86.cpp matmul/no_arm.cpp)
endif()
foreach(set ${matmul_sets})
  target_sources(halfbin_kernels PRIVATE matmul/${set}.cpp)
  set_source_files_properties(matmul/${set}.cpp PROPERTIES COMPILE_OPTIONS "${matmul_${set}}")
endforeach()
# These change no value; without them the loops in steps.h do not become vector instructions.
target_compile_options(halfbin_kernels PRIVATE -fno-trapping-math -fno-math-errno)
