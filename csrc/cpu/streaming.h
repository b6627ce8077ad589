// How fast memory can be read: what no kernel that reads its weights once can beat.
#pragma once

#include <cstddef>
#include <cstdint>

namespace halfbin {

// The sum of num_words words, each of the threads reading one run of neighbours: a pass over memory and nothing else.
// words: any alignment that uint64_t allows.
uint64_t ReadOnce(const uint64_t* words, size_t num_words, size_t num_threads);

}  // namespace halfbin
