#include "cpu/threads.h"

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace halfbin {
namespace {

constexpr int kSpins = 2000;  // looks at the next job before a thread goes to sleep: some tens of microseconds

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

class Pool {
 public:
  Pool() = default;
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  ~Pool() {
    {
      const std::lock_guard<std::mutex> lock(sleep_);
      ending_ = true;
      ++job_;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void Run(size_t num_threads, size_t num_tasks, const std::function<void(size_t)>& work) {
    const std::lock_guard<std::mutex> one_at_a_time(running_);
    const size_t helpers = (num_threads < num_tasks ? num_threads : num_tasks) - 1;
    while (threads_.size() < helpers) {
      threads_.emplace_back([this, index = threads_.size(), seen = job_.load()] { Help(index, seen); });
    }
    work_ = &work;
    num_tasks_ = num_tasks;
    next_.store(0, std::memory_order_relaxed);
    helpers_ = helpers;
    busy_.store(threads_.size(), std::memory_order_relaxed);
    {
      const std::lock_guard<std::mutex> lock(sleep_);
      job_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    TakeTasks();
    for (int spins = 0; busy_.load(std::memory_order_acquire) != 0; ++spins) {
      if (spins < kSpins) {
        Pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  void TakeTasks() {
    for (size_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < num_tasks_;) (*work_)(task);
  }

  void Help(size_t index, size_t seen);

  std::mutex running_, sleep_;
  std::condition_variable wake_;
  std::vector<std::thread> threads_;
  std::atomic<size_t> job_{0}, next_{0}, busy_{0};
  const std::function<void(size_t)>* work_ = nullptr;
  size_t num_tasks_ = 0, helpers_ = 0;
  bool ending_ = false;
};

thread_local bool inside = false;  // a task of a pool

void Pool::Help(size_t index, size_t seen) {
  inside = true;
  for (;;) {
    for (int spins = 0; spins < kSpins && job_.load(std::memory_order_acquire) == seen; ++spins) Pause();
    {
      std::unique_lock<std::mutex> lock(sleep_);
      wake_.wait(lock, [this, seen] { return job_.load(std::memory_order_acquire) != seen; });
      if (ending_) return;
    }
    seen = job_.load(std::memory_order_acquire);
    if (index < helpers_) TakeTasks();
    busy_.fetch_sub(1, std::memory_order_release);
  }
}

Pool* pool = nullptr;  // made when first needed, and left to the system at the end, as its threads may be asleep then
std::mutex making;
std::atomic<GompParallel> openmp{nullptr};

// What the threads of an OpenMP team take tasks from.
struct Job {
  const std::function<void(size_t)>& work;
  size_t num_tasks;
  std::atomic<size_t> next{0};
};

void TakeFrom(void* data) {
  Job& job = *static_cast<Job*>(data);
  const bool before = inside;
  inside = true;
  for (size_t task; (task = job.next.fetch_add(1, std::memory_order_relaxed)) < job.num_tasks;) job.work(task);
  inside = before;
}

void ForgetOnFork() {
#if defined(__unix__) || defined(__APPLE__)
  static const int registered = pthread_atfork(nullptr, nullptr, [] {
    pool = nullptr;  // its threads stayed with the parent, and so did OpenMP's
    openmp = nullptr;
    new (&making) std::mutex();
    inside = false;
  });
  static_cast<void>(registered);
#endif
}

Pool& ThePool() {
  const std::lock_guard<std::mutex> lock(making);
  if (pool == nullptr) {
    pool = new Pool();
    ForgetOnFork();
  }
  return *pool;
}

}  // namespace

void ParallelFor(size_t num_threads, size_t num_tasks, const std::function<void(size_t)>& work) {
  if (num_threads <= 1 || num_tasks <= 1 || inside) {
    for (size_t task = 0; task < num_tasks; ++task) work(task);
    return;
  }
  if (const GompParallel parallel = openmp.load(std::memory_order_relaxed)) {
    Job job{work, num_tasks};
    parallel(TakeFrom, &job, static_cast<unsigned>(num_threads < num_tasks ? num_threads : num_tasks), 0);
    return;
  }
  Pool& here = ThePool();
  inside = true;
  here.Run(num_threads, num_tasks, work);
  inside = false;
}

void UseOpenMp(GompParallel parallel) {
  ForgetOnFork();
  openmp = parallel;
}

bool UsesOpenMp() { return openmp.load(std::memory_order_relaxed) != nullptr; }

}  // namespace halfbin
