// The threads that a kernel's work is shared out to: those of the OpenMP runtime that the rest of the process computes with, where it was
// named, and else a small pool of our own.
//
// Two pools on the same cores fight: after each parallel region OpenMP's threads wait for the next one by spinning, some milliseconds
// long, on the cores that ours want then. A model whose norms and attention run in torch decoded 11.2 tokens a second with a pool
// beside torch's, and 17.4 without (TinyLlama's shape, int4, 2 threads of an Intel Xeon).
#pragma once

#include <cstddef>
#include <functional>

namespace halfbin {

// Call work(0), ..., work(num_tasks - 1), on up to num_threads threads of which the caller's is one, and return when all are done.
// Tasks are taken as threads come free, so their bits must not depend on who runs them. Threads are made when first asked for and
// kept; a process forked from this one makes its own. Work that calls ParallelFor itself runs those tasks on its own thread.
// `work` must not throw.
//
// A child of fork computes with a pool of our own: GNU's OpenMP does not survive one.
void ParallelFor(size_t num_threads, size_t num_tasks, const std::function<void(size_t)>& work);

// From now on, share work out by the function GOMP_parallel of a loaded GNU OpenMP runtime; null: by our own pool.
using GompParallel = void (*)(void (*function)(void*), void* data, unsigned num_threads, unsigned flags);
void UseOpenMp(GompParallel parallel);
bool UsesOpenMp();

}  // namespace halfbin
