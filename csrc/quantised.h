// Operations on quantised weights, for whole batches, on all threads. Pointers are not checked here: ops/ did that.
// x and out are FP32, rows contiguous.
#pragma once
#include <cstdint>

namespace deepseek {

// out[t, g, :] = W_g x[t, g, :] for `groups` matrices of `rows` x `columns` that begin `stride` bytes apart.
void quantised_linear(const float* x, int64_t tokens, int64_t groups, int64_t columns, const uint8_t* w, int64_t stride,
                      int64_t rows, int bits, float* out, int threads);

// out[t] = sum over k of weight[t, k] * mlp(expert index[t, k])(x[t]), k ascending, plus shared(x[t]) where given.
// experts[e]: one packed gated MLP each. top = 0 and a shared MLP: that MLP alone.
void quantised_experts(const float* x, int64_t tokens, int64_t hidden, const int64_t* index, const float* weight,
                       int64_t top, const uint8_t* const* experts, int64_t num_experts, int64_t inner,
                       const uint8_t* shared, int64_t shared_inner, int bits, float* out, int threads);

// out[t, g, :] = W_g x[t, g, :] with BF16 weights in panels (kernels.h), `rows` a multiple of 16; x[t, g] begins at
// t * token_stride + g * group_stride.
void bf16_linear(const float* x, int64_t tokens, int64_t groups, int64_t columns, int64_t token_stride,
                 int64_t group_stride, const uint16_t* w, int64_t rows, float* out, int threads);

void rms_norm(const float* x, int64_t tokens, int64_t width, int64_t stride, const float* w, float eps, float* out,
              int threads);

// Absorbed MLA. q_latent [B, T, N, R], q_rope [B, T, N, P], cache [B, ., R + P] with `stride` numbers from one sequence to
// the next; query t of sequence b sees positions first[b] … past[b] + t. out [B, T, N, R].
void mla_attention(const float* q_latent, const float* q_rope, const float* cache, int64_t stride, const int64_t* first,
                   const int64_t* past, int64_t batch, int64_t tokens, int64_t heads, int64_t rank, int64_t rope,
                   float scale, float* out, int threads);

}  // namespace deepseek
