#include "gptq/columns.h"

#include <cstring>

namespace halfbin {

RoundColumnsKernel RoundColumnsOf(const char* instruction_set) {
  if (std::strcmp(instruction_set, "portable") == 0) return kRoundColumnsPortable;
#if defined(__x86_64__)
  if (std::strcmp(instruction_set, "avx2") == 0) return kRoundColumnsAvx2;
  if (std::strcmp(instruction_set, "avx512") == 0) return kRoundColumnsAvx512;
#endif
  return nullptr;
}

}  // namespace halfbin
