// A linear layer from end to end: choose the instruction set, round the inputs, multiply, on several threads.
#pragma once

#include <string>
#include <vector>

#include "matmul/product.h"

namespace halfbin::matmul {

// Names of the instruction sets that this build has and this processor runs, the preferred one first; "portable" is the last.
std::vector<std::string> InstructionSets();

// One of them by its name, or for a null name the best one for m tokens. Null: there is none of this name.
const InstructionSet* Find(const char* name, size_t m);

// How the inputs of m tokens are cut for an instruction set; see Inputs.
struct Cut {
  size_t tile, run;
};
Cut CutFor(size_t m, const InstructionSet& set, const Weights& weights);

// Tokens that are rounded in one task, where inputs are many.
constexpr size_t kRoundedTogether = 16;

struct Linear {
  Weights weights;
  Tensor x;  // [m, k]
  size_t m;
  InputGrid grid;
  Tensor bias;  // [n]
  void* y;      // [m, n]
  Float y_type;
};

// Returns how many tokens hold NaN or infinity; their outputs are NaN. The bits of y depend on neither the instruction set nor the
// number of threads.
size_t Run(const Linear& linear, const InstructionSet& set, size_t num_threads);

}  // namespace halfbin::matmul
