// What this processor can run, as the operating system lets it: instruction sets by the names that the kernels ask for.
#pragma once

#include <string>
#include <vector>

namespace halfbin {

// Names of the instruction sets that are usable here, such as "avx2", "avx_vnni", "avx512_vnni", "amx_int8", "neon_dotprod".
// Nothing is named whose registers the operating system does not save.
std::vector<std::string> CpuFeatures();

}  // namespace halfbin
