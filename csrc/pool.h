// A small thread pool. The caller works too; helpers spin for a moment after their work and then sleep, so that a chain of
// short calls costs no wake-up and an idle process no processor time.
#pragma once
#include <cstdint>
#include <functional>

namespace deepseek {

// Calls work(i) for i in 0 … tasks-1, each once, on at most `threads` threads (the caller's included); returns when all are
// done. Tasks are taken in order, one by one. Calls from several threads take turns. `work` must not throw
// and must not call `parallel` itself.
void parallel(int64_t tasks, int threads, const std::function<void(int64_t)>& work);

}  // namespace deepseek
