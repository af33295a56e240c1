#include "moments.h"

#include <algorithm>

#include "scratch.h"
#include "training.h"

namespace deepseek {
namespace {

constexpr int64_t kBlocks = 64;  // a task

// work(block, its first number, the block of `out`, that of `in`): what lies beyond `count` is zeros, and not written.
template <typename Out, typename In, typename Work>
void by_blocks(Out* out, const In* in, int64_t count, int threads, const Work& work) {
  const int64_t blocks = divide_up(count, kMoments);
  parallel(divide_up(blocks, kBlocks), threads, [&](int64_t i) {
    for (int64_t b = i * kBlocks; b < std::min(blocks, (i + 1) * kBlocks); ++b) {
      const int64_t at = b * kMoments, some = count - at;
      if (some >= kMoments) {
        work(b, at, out + at, in + at);
        continue;
      }
      Out last_out[kMoments] = {};
      In last_in[kMoments] = {};
      std::copy_n(out + at, some, last_out), std::copy_n(in + at, some, last_in);
      work(b, at, last_out, last_in);
      std::copy_n(last_out, some, out + at);
    }
  });
}

}  // namespace

void adamw8(void* weight, const void* gradient, bool bf16, int64_t count, uint8_t* first, float* first_scale,
            uint8_t* second, float* second_scale, const AdamwStep& step, int threads) {
  auto run = [&](auto* weights, auto* gradients, auto block) {
    by_blocks(weights, gradients, count, threads, [&](int64_t b, int64_t at, auto* w, auto* g) {
      block(w, g, (uint32_t)at, first + at, first_scale + b, second + at, second_scale + b, step);
    });
  };
  if (bf16)
    run((uint16_t*)weight, (const uint16_t*)gradient, training_kernels().adamw8_bf16_block);
  else
    run((float*)weight, (const float*)gradient, training_kernels().adamw8_block);
}

void moved(uint16_t* weight, const float* by, int64_t count, float decay, float size, uint32_t seed, int threads) {
  auto block = training_kernels().moved_block;
  by_blocks(weight, by, count, threads, [&](int64_t, int64_t at, uint16_t* w, const float* d) {
    block(w, d, (uint32_t)at, decay, size, seed);
  });
}

void momentum8(const float* gradient, int64_t count, int8_t* momentum, float* scale, float beta, float rest,
               float* ahead, int threads) {
  auto block = training_kernels().momentum8_block;
  by_blocks(ahead, gradient, count, threads, [&](int64_t b, int64_t at, float* out, const float* g) {
    block(g, momentum + at, scale + b, beta, rest, out);
  });
}

}  // namespace deepseek
