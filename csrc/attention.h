// Multi-head latent attention over a latent cache, naive and absorbed (model/mla.py). Pointers are not checked here: ops/ did
// that. Shape letters: T tokens of all sequences, N heads, R latent rank, P rotary width.
#pragma once
#include <algorithm>
#include <cstdint>

#include "kernels.h"

namespace deepseek {

// Sequences of a call and where their rows of the latent cache lie. Positions count from a sequence's first visible one,
// in blocks of kKeys rows; the rows of a block are neighbours, the blocks lie anywhere (pages of a pool).
struct Sequences {
  int64_t count;
  const int64_t* begin;  // [count + 1] new tokens, side by side; those of sequence s are begin[s] … begin[s + 1] - 1
  const int64_t* past;  // [count] position of its first new token; negative: padding, which sees nothing
  const int64_t* block_begin;  // [count + 1] its part of `blocks`
  const int64_t* blocks;  // numbers from the beginning of the cache to a block's first row

  int64_t tokens() const { return begin[count]; }
  int64_t size(int64_t s) const { return begin[s + 1] - begin[s]; }
  int64_t seen(int64_t s, int64_t t) const {
    return std::max<int64_t>(0, past[s] + t + 1);
  }  // positions, by its token t
  const int64_t* blocks_of(int64_t s) const { return blocks + block_begin[s]; }
  // Numbers to the row of a position. Rows of padding lie before the first block.
  int64_t row(int64_t s, int64_t position, int64_t width) const {
    const int64_t block = std::max<int64_t>(0, position) / kKeys;
    return blocks_of(s)[block] + (position - block * kKeys) * width;
  }
};

// Before attention: rotates the rotary part of q [T, N, nope + rope] into q_rope [T, N, rope], and writes the latents,
// normalised, and the rotated keys of kv [T, rank + rope] to their rows of the cache. cos, sin: [T, rope / 2]. Rotated
// pairs lie as two halves, as in model/layers.py.
struct Rotary {
  const float *cos, *sin;
  bool interleaved;
};
void mla_prepare(const float* q, const float* kv, const float* norm, float eps, const Rotary& rotary,
                 const Sequences& sequences, int64_t heads, int64_t nope, int64_t rope, int64_t rank, float* q_rope,
                 float* cache, int threads);

// Absorbed order: q_latent [T, N, R] and q_rope [T, N, P] against the latents themselves. out [T, N, R]. q_latent null:
// zeros.
void mla_absorbed(const float* q_latent, const float* q_rope, const float* cache, const Sequences& sequences,
                  int64_t heads, int64_t rank, int64_t rope, float scale, float* out, int threads);

// Naive order: each head's keys and values are rebuilt from the latents by its `nope + value` rows of kv_b. q
// [T, N, nope + P], of which the first `nope` are read; out [T, N, value].
void mla_naive(const float* q, const float* q_rope, const float* cache, const Sequences& sequences, int64_t heads,
               int64_t rank, int64_t rope, int64_t nope, int64_t value, const uint8_t* kv_b, int bits, float scale,
               float* out, int threads);

}  // namespace deepseek
