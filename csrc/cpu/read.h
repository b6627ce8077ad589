// What memory gives: the limit that products of few tokens are measured against.
#pragma once

#include <cstddef>
#include <cstdint>

namespace halfbin {

// Read `bytes`, a multiple of 64, in order, each thread its own part, and return the sum of their 64-bit words.
uint64_t StreamingRead(const uint8_t* memory, size_t bytes, size_t num_threads);

}  // namespace halfbin
