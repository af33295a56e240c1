// Memory for intermediates, and loops over items too small to be tasks.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "pool.h"

namespace deepseek {

// Aligned memory, kept between calls by the thread that owns it: operating systems hand out zeroed pages, and a few
// megabytes a call would be thousands of page faults.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  // Starts over with room for `bytes`; what was taken before is gone. Throws std::bad_alloc.
  void reserve(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      data_ = nullptr, size_ = 0;
      data_ = static_cast<char*>(std::aligned_alloc(64, (bytes + kBeyond) / 64 * 64));
      if (!data_) throw std::bad_alloc();
      size_ = bytes;
    }
    used_ = 0;
  }

  template <typename T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(data_ + used_);
    used_ += room<T>(count);
    return p;
  }

  // Starts over with one array.
  template <typename T = float>
  T* only(int64_t count) {
    reserve(room<T>(count));
    return take<T>(count);
  }

  template <typename T>
  static size_t room(int64_t count) {
    return (sizeof(T) * count + 63) / 64 * 64;
  }

 private:
  static constexpr size_t kBeyond = 8192;  // prefetches run over the end
  char* data_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs work(i) for i < count, at least `at_least` at a time.
template <typename Work>
void in_pieces(int64_t count, int64_t at_least, int threads, const Work& work) {
  int64_t piece = std::max(at_least, divide_up(count, 4 * threads));
  parallel(divide_up(count, piece), threads, [&](int64_t i) {
    for (int64_t j = i * piece; j < std::min(count, (i + 1) * piece); ++j) work(j);
  });
}

}  // namespace deepseek
