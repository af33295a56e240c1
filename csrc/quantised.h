// Operations on quantised weights, for whole batches, on all threads. Pointers are not checked here: ops/ did that.
// x and out are FP32, rows contiguous.
#pragma once
#include <cstdint>

namespace deepseek {

// A matrix [rows, columns] -> panels, which must hold zeros; squares: the squared error and the squared weights.
void quantise_panels(const float* w, int64_t rows, int64_t columns, int bits, uint8_t* out, double* squares,
                     int threads);

// out[t, g, :] = W_g x[t, g, :] for `groups` matrices of `rows` x `columns` that begin `stride` bytes apart.
void quantised_linear(const float* x, int64_t tokens, int64_t groups, int64_t columns, const uint8_t* w, int64_t stride,
                      int64_t rows, int bits, float* out, int threads);

// out[t] = sum over k of weight[t, k] * mlp(expert index[t, k])(x[t]), k ascending, plus shared(x[t]) where given.
// experts[e]: one packed gated MLP each. top = 0 and a shared MLP: that MLP alone.
void quantised_experts(const float* x, int64_t tokens, int64_t hidden, const int64_t* index, const float* weight,
                       int64_t top, const uint8_t* const* experts, int64_t num_experts, int64_t inner,
                       const uint8_t* shared, int64_t shared_inner, int bits, float* out, int threads);

// out[t, g, :] = W_g x[t, g, :] with BF16 or FP32 weights in panels (kernels.h), `rows` a multiple of 16; x[t, g] begins
// at t * token_stride + g * group_stride.
void panel_linear(const float* x, int64_t tokens, int64_t groups, int64_t columns, int64_t token_stride,
                  int64_t group_stride, const void* w, bool bf16, int64_t rows, float* out, int threads);

// What a gate decides from its logits [tokens, experts] (model/gate.py has the formulas).
struct Gate {
  int64_t experts, groups, kept_groups, top;
  int group_best;       // how many choices make a group's score; 0: groups play no part
  bool sigmoid;         // else softmax
  bool normalise;       // weights sum to one before `scale`
  bool scale_anyway;    // V3 scales normalised weights, V2 does not
  float scale;
};
void choose_experts(const float* logits, int64_t tokens, const Gate& gate, const float* bias, float* scores,
                    int64_t* index, float* weight, int threads);

void rms_norm(const float* x, int64_t tokens, int64_t width, int64_t stride, const float* w, float eps, float* out,
              int threads);

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

// Absorbed MLA. q_latent [B, T, N, R], q_rope [B, T, N, P], cache [B, ., R + P] with `stride` numbers from one sequence to
// the next; query t of sequence b sees positions first[b] … past[b] + t (at least
// its own). out [B, T, N, R].
void mla_attention(const float* q_latent, const float* q_rope, const float* cache, int64_t stride, const int64_t* first,
                   const int64_t* past, int64_t batch, int64_t tokens, int64_t heads, int64_t rank, int64_t rope,
                   float scale, float* out, int threads);

// A decoder layer whose matrices are quantised: x + attention(norm(x)), then + ffn(norm(…)), in one call; step by step it is
// the FusedMLA, FusedGate and modules of quant/. Pointers to what a model lacks are null; biases are added to their
// products.
struct Mla {
  int64_t hidden, heads, nope, rope, rank, value, q_rank;  // q_rank 0: `q_b` is q_proj
  int bits;
  const uint8_t *q_a, *q_b, *kv_a, *kv_b, *o;
  const float *q_norm, *kv_norm, *q_a_bias, *kv_a_bias, *o_bias;
  float q_eps, kv_eps, scale;
  const uint16_t* key;  // BF16 panels of the key half of kv_b, [heads][rank / 16][nope][16]
  bool interleaved;
};
struct Ffn {
  int64_t inner, shared_inner;
  int bits;
  Gate gate;                // no experts: a dense layer, whose MLP is `shared`
  const void* gate_weight;  // panels, [ceil(experts / 16)][hidden][16]
  bool gate_bf16;
  const float* gate_bias;
  const uint8_t* const* experts;
  const uint8_t* shared;
};
struct Layer {
  Mla mla;
  Ffn ffn;
  const float *attention_norm, *ffn_norm;
  float eps;
};
// x, out [B, T, hidden]; `cache` and `cos`, `sin` as in mla_prepare, `first` as in mla_attention; scores [B T, experts],
// index and weight [B T, top] get what the gate decided.
void layer_forward(const Layer& layer, const float* x, int64_t batch, int64_t tokens, const float* cos, const float* sin,
                   bool per_sequence, float* cache, int64_t stride, const int64_t* first, int64_t past, float* scores,
                   int64_t* index, float* weight, float* out, int threads);

}  // namespace deepseek
