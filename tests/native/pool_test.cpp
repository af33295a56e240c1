// The thread pool under the thread sanitizer (`make sanitize`): calls of all sizes on changing numbers of threads, from
// several threads at once, some after the helpers fell asleep.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/pool.h"

namespace {

void caller(unsigned seed) {
  std::mt19937 random(seed);
  for (int call = 0; call < 1500; ++call) {
    const int64_t tasks = random() % 40;
    std::vector<int64_t> done(tasks, 0);
    std::atomic<int64_t> sum{0};
    deepseek::parallel(tasks, 1 + (int)(random() % 4), [&](int64_t i) {
      ++done[i];
      sum.fetch_add(i, std::memory_order_relaxed);
    });
    for (int64_t n : done)
      if (n != 1) std::abort();
    if (sum != tasks * (tasks - 1) / 2) std::abort();
    if (call % 500 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
}

}  // namespace

int main() {
  std::vector<std::thread> callers;
  for (unsigned seed = 0; seed < 3; ++seed) callers.emplace_back(caller, seed);
  for (auto& thread : callers) thread.join();
  std::puts("pool: every task once");
}
