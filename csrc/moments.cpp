#include "moments.h"

#include "scratch.h"
#include "training.h"

namespace deepseek {
namespace {

constexpr int64_t kBlocks = 64;  // a task

template <typename Work>
void by_blocks(int64_t count, int threads, const Work& work) {
  int64_t blocks = divide_up(count, kMoments);
  parallel(divide_up(blocks, kBlocks), threads, [&](int64_t i) {
    for (int64_t b = i * kBlocks; b < std::min(blocks, (i + 1) * kBlocks); ++b)
      work(b, b * kMoments, std::min(kMoments, count - b * kMoments));
  });
}

}  // namespace

void adamw8(float* weight, const float* gradient, int64_t count, int8_t* first, float* first_scale, uint8_t* second,
            float* second_scale, const AdamwStep& step, int threads) {
  auto block = training_kernels().adamw8_block;
  by_blocks(count, threads, [&](int64_t b, int64_t at, int64_t some) {
    block(weight + at, gradient + at, some, (uint32_t)at, first + at, first_scale + b, second + at, second_scale + b,
          step);
  });
}

void momentum8(const float* gradient, int64_t count, int8_t* momentum, float* scale, float beta, float rest,
               float* ahead, int threads) {
  auto block = training_kernels().momentum8_block;
  by_blocks(count, threads, [&](int64_t b, int64_t at, int64_t some) {
    block(gradient + at, some, momentum + at, scale + b, beta, rest, ahead + at);
  });
}

}  // namespace deepseek
