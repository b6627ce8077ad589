// A small pool of threads that a kernel's work is shared out to.
#pragma once

#include <cstddef>
#include <functional>

namespace halfbin {

// Call work(0), ..., work(num_tasks - 1), on up to num_threads threads of which the caller's is one, and return when all are done.
// Tasks are taken as threads come free, so their bits must not depend on who runs them. Threads are made when first asked for and
// kept; a process forked from this one makes its own. Work that calls ParallelFor itself runs those tasks on its own thread.
// `work` must not throw.
void ParallelFor(size_t num_threads, size_t num_tasks, const std::function<void(size_t)>& work);

}  // namespace halfbin
