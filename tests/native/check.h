// What the parts of kernels_test share. Every buffer ends where its data ends, so that a read too far is seen.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <random>
#include <string>

#include "../../csrc/kernels.h"

namespace deepseek {

inline std::mt19937 generator(1);
inline int64_t compared = 0;

inline int64_t below(int64_t n) { return (int64_t)(generator() % n); }
inline float normal() { return std::normal_distribution<float>()(generator); }

// Exactly `count` numbers, beginning `offset` numbers after a multiple of 64 bytes.
template <typename T>
class Exact {
 public:
  explicit Exact(int64_t count, int64_t offset = 0) : count_(count), offset_(offset) {
    if (posix_memalign(&memory_, 64, sizeof(T) * (count + offset))) std::abort();
    std::memset(memory_, 0, sizeof(T) * (count + offset));
  }
  Exact(const Exact&) = delete;
  ~Exact() { std::free(memory_); }
  T* get() { return static_cast<T*>(memory_) + offset_; }
  T& operator[](int64_t i) { return get()[i]; }
  int64_t size() const { return count_; }
  template <typename Make>
  Exact& fill(Make make) {
    for (int64_t i = 0; i < count_; ++i) get()[i] = make();
    return *this;
  }

 private:
  void* memory_ = nullptr;
  int64_t count_, offset_;
};

template <typename T>
void same(Exact<T>& a, Exact<T>& b, const char* what, const std::string& where) {
  ++compared;
  if (a.size() == b.size() && !std::memcmp(a.get(), b.get(), sizeof(T) * a.size())) return;
  std::printf("%s: %s differs\n", where.c_str(), what);
  std::exit(1);
}

inline std::string at(const Kernels& table, std::initializer_list<int64_t> numbers) {
  std::string text = table.name;
  for (int64_t n : numbers) text += " " + std::to_string(n);
  return text;
}

// An activation row of one of the kinds that exist.
inline void random_row(float* x, int64_t columns) {
  const float sizes[] = {1.0f, 1e-42f, 1e37f, 1e-37f, 0.0f, 300.0f};
  const float size = sizes[below(6)];
  for (int64_t k = 0; k < columns; ++k) x[k] = normal() * size;
  if (!below(8)) x[below(columns)] = below(2) ? NAN : -INFINITY;
}

// run(out, threads) on one, two and five threads.
template <typename Run>
void on_threads(const char* what, int64_t size, const Run& run) {
  Exact<float> one(size, 1);
  run(one.get(), 1);
  for (int threads : {2, 5}) {
    Exact<float> out(size, 1);
    run(out.get(), threads);
    same(out, one, what, at(kernels(), {size, threads}));
  }
}

void test_two_bits(const Kernels& table);
void test_coding();
void test_training(bool units);

}  // namespace deepseek
