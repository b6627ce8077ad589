# CRC-32: a plain form, and one for the instructions that processors have for it.
target_sources(halfbin_kernels PRIVATE checksum/crc32.cpp)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  target_sources(halfbin_kernels PRIVATE checksum/pclmul.cpp)
  set_source_files_properties(checksum/pclmul.cpp PROPERTIES COMPILE_OPTIONS "-msse4.1;-mpclmul")
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
  target_sources(halfbin_kernels PRIVATE checksum/neon_crc.cpp)
  set_source_files_properties(checksum/neon_crc.cpp PROPERTIES COMPILE_OPTIONS "-march=armv8-a+crc")
endif()
