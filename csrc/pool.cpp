#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace deepseek {
namespace {

// Longer than the gap between two operations: 200 microseconds where a pause takes 140 cycles (Intel since Skylake), some
// 10 elsewhere.
constexpr int kSpins = 4000;

inline void breathe() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Job {
  const std::function<void(int64_t)>* work = nullptr;
  int64_t tasks = 0;
};

class Pool {
 public:
  void run(int64_t tasks, int threads, const std::function<void(int64_t)>& work) {
    std::lock_guard<std::mutex> turn(turn_);
    while ((int)helpers_.size() < threads - 1) {
      int rank = (int)helpers_.size();
      helpers_.emplace_back([this, rank] { help(rank); });
    }
    int64_t helpers = std::min<int64_t>(threads - 1, tasks - 1);
    job_ = {&work, tasks};
    next_.store(0, std::memory_order_relaxed);
    busy_.store((int)helpers, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(sleep_);
      // the round and who takes part in it, in one number: a helper must not mix two rounds
      round_.store(((round_.load() >> 16) + 1) << 16 | (uint64_t)helpers, std::memory_order_release);
    }
    if (sleepers_.load() > 0) wake_.notify_all();
    take();
    for (int spins = 0; busy_.load(std::memory_order_acquire) > 0; ++spins) {
      if (spins < kSpins)
        breathe();
      else
        std::this_thread::yield();  // a neighbour took the helper's core
    }
  }

 private:
  void take() {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < job_.tasks;) (*job_.work)(i);
  }

  void help(int rank) {
    uint64_t seen = 0;
    for (;;) {
      int spins = 0;
      while (round_.load(std::memory_order_acquire) == seen && spins < kSpins) breathe(), ++spins;
      if (round_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(sleep_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [&] { return round_.load(std::memory_order_relaxed) != seen; });
        sleepers_.fetch_sub(1);
      }
      // A helper that is not wanted may miss whole rounds, so it takes the newest; a wanted one is waited for.
      seen = round_.load(std::memory_order_acquire);
      if (rank < (int)(seen & 0xffff)) {
        take();
        busy_.fetch_sub(1, std::memory_order_release);
      }
    }
  }

  std::mutex turn_, sleep_;
  std::condition_variable wake_;
  std::vector<std::thread> helpers_;
  Job job_;
  std::atomic<int64_t> next_{0};
  std::atomic<int> busy_{0}, sleepers_{0};
  std::atomic<uint64_t> round_{0};
};

Pool* pool = nullptr;
std::mutex making;

Pool& the_pool() {
  std::lock_guard<std::mutex> lock(making);
  if (!pool) {
    pool = new Pool;  // never destroyed: helpers may outlive static destructors
    static bool registered = false;
    if (!registered) {  // a forked child has no helpers: it forgets the pool and makes its own
      registered = true;
      pthread_atfork([] { making.lock(); }, [] { making.unlock(); }, [] { pool = nullptr, making.unlock(); });
    }
  }
  return *pool;
}

}  // namespace

void parallel(int64_t tasks, int threads, const std::function<void(int64_t)>& work) {
  if (tasks <= 0) return;
  if (threads <= 1 || tasks == 1) {
    for (int64_t i = 0; i < tasks; ++i) work(i);
    return;
  }
  the_pool().run(tasks, threads, work);
}

}  // namespace deepseek
