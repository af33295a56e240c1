// Multi-head latent attention over a latent cache, in both orders (model/mla.py). Pointers are not checked here: ops/ did
// that. Shape letters: B batch, T tokens, N heads, R latent rank, P rotary width.
#pragma once
#include <cstdint>

namespace deepseek {

// Before attention: rotates the rotary part of q [B, T, N, nope + rope] into q_rope [B, T, N, rope], and writes the latents,
// normalised, and the rotated keys of kv [B, T, rank + rope] to cache rows past … past + T - 1 (`stride` numbers from one
// sequence to the next). cos, sin: [B or 1, T, rope / 2]. Rotated pairs lie as two halves, as in model/layers.py.
struct Rotary {
  const float *cos, *sin;
  bool per_sequence, interleaved;
};
void mla_prepare(const float* q, const float* kv, const float* norm, float eps, const Rotary& rotary, int64_t batch,
                 int64_t tokens, int64_t heads, int64_t nope, int64_t rope, int64_t rank, float* q_rope, float* cache,
                 int64_t stride, int64_t past, int threads);

// What attention reads: cache [B, ., R + P] with `stride` numbers from one sequence to the next; query t of sequence b sees
// positions first[b] … past[b] + t. A query before first[b] is padding and gets zeros.
struct Past {
  const float* cache;
  int64_t stride;
  const int64_t *first, *past;
  int64_t batch, tokens;  // of queries
};

// Absorbed order: q_latent [B, T, N, R] and q_rope [B, T, N, P] against the latents themselves. out [B, T, N, R].
void mla_absorbed(const float* q_latent, const float* q_rope, const Past& past, int64_t heads, int64_t rank, int64_t rope,
                  float scale, float* out, int threads);

// Naive order: each head's keys and values are rebuilt from the latents by its `nope + value` rows of kv_b. q
// [B, T, N, nope + P], of which the first `nope` are read; out [B, T, N, value].
void mla_naive(const float* q, const float* q_rope, const Past& past, int64_t heads, int64_t rank, int64_t rope,
               int64_t nope, int64_t value, const uint8_t* kv_b, int bits, float scale, float* out, int threads);

}  // namespace deepseek
