// Optimizer steps whose moments are kept in 8 bits, by blocks of 256 numbers with a scale of their own (ops/moments.py says
// the arithmetic; its torch form gives the same bits).
#pragma once
#include <cstdint>

namespace deepseek {

constexpr int64_t kMoments = 256;  // numbers that share a scale; the last block of a tensor is filled up with zeros

// One step of AdamW; all factors are those of this step.
struct AdamwStep {
  float decay, size;  // weight = weight * decay - size * first / root(second + least)
  float beta1, beta2, rest1, rest2;  // rest = 1 - beta
  float least;
  uint32_t seed, weight_seed;  // of the rounding of the second moment, and of BF16 weights
};

// `count` weights and gradients, both FP32 or both BF16; codes of whole blocks, a scale for each block. Contiguous memory.
void adamw8(void* weight, const void* gradient, bool bf16, int64_t count, uint8_t* first, float* first_scale, uint8_t* second,
            float* second_scale, const AdamwStep& step, int threads);
// momentum = beta * momentum + rest * gradient; ahead = beta * momentum + rest * gradient. `ahead` may be the gradient.
void momentum8(const float* gradient, int64_t count, int8_t* momentum, float* scale, float beta, float rest,
               float* ahead, int threads);

// BF16 weight = weight * decay - by * size, rounded up or down by chance.
void moved(uint16_t* weight, const float* by, int64_t count, float decay, float size, uint32_t seed, int threads);

}  // namespace deepseek
