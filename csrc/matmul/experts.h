// The linear layers of a mixture of experts: each token goes through those that a router chose for it, all in one call.
#pragma once

#include <cstddef>
#include <cstdint>

#include "matmul/linear.h"

namespace halfbin::matmul {

struct Experts {
  const uint8_t* packed;  // [count] weights as weights.h lays them out, `stride` bytes apart, all of the first one's header
  size_t count, stride;
  Tensor x;  // [m, k]
  size_t m;
  const int64_t* chosen;  // [m, slots], 0 to count - 1; a token may choose an expert more than once
  size_t slots;
  InputGrid grid;
  Tensor bias;  // [count, n]
  void* y;      // [m, slots, n]
  Float y_type;
};

// Where `chosen` first names an expert that there is not; -1: nowhere.
int64_t FirstUnknown(const Experts& experts);

// y[t, i] = x_hat[t] @ w_hat[chosen[t, i]]^T + bias[chosen[t, i]], to the bit what Run gives for each expert alone.
//
// A token is rounded once, whoever chose it. Tasks are some panels of one expert times all of its tokens, so that two experts of a
// token each keep two threads busy. Experts that nobody chose are not touched. How the outputs of a token's experts are weighted and
// added is left to the caller: between two layers there are an activation and sometimes a norm, and the sum's order is the model's.
//
// The instruction set is the one of this name, or for a null name each expert's best for as many tokens as chose it; there must be one.
// Returns how many tokens hold NaN or infinity; their outputs are NaN. FirstUnknown must be -1.
size_t RunExperts(const Experts& experts, const char* set_name, size_t num_threads);

}  // namespace halfbin::matmul
