// Elsewhere none of x86-64's instruction sets is there.
#include "matmul/product.h"

namespace halfbin::matmul {

const InstructionSet* Avx2() { return nullptr; }
const InstructionSet* AvxVnni() { return nullptr; }
const InstructionSet* Avx512Vnni() { return nullptr; }
const InstructionSet* AmxInt8() { return nullptr; }

}  // namespace halfbin::matmul
