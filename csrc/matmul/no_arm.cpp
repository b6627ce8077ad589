// Elsewhere none of Arm's instruction sets is there.
#include "matmul/product.h"

namespace halfbin::matmul {

const InstructionSet* NeonDotprod() { return nullptr; }
const InstructionSet* NeonI8mm() { return nullptr; }

}  // namespace halfbin::matmul
