#pragma once
#include "quantised.h"

namespace deepseek {

// A decoder layer whose matrices are quantised: x + attention(norm(x)), then + ffn(norm(…)), in one call; step by step it
// is the FusedMLA, FusedGate and modules of quant/. Pointers to what a model lacks are null; biases are added to their
// products.
struct Mla {
  int64_t hidden, heads, nope, rope, rank, value, q_rank;  // q_rank 0: `q_b` is q_proj
  int bits;
  const uint8_t *q_a, *q_b, *kv_a, *kv_b, *o;
  const float *q_norm, *kv_norm, *q_a_bias, *kv_a_bias, *o_bias;
  float q_eps, kv_eps, scale;
  const uint8_t* key;  // the key half of kv_b, turned round for the absorbed order: per head [rank, nope] in 8 bits
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
// x, out [B, T, hidden]; `cache` and `cos`, `sin` as in mla_prepare, `first` as in Past; scores [B T, experts], index and
// weight [B T, top] get what the gate decided.
void layer_forward(const Layer& layer, const float* x, int64_t batch, int64_t tokens, const float* cos, const float* sin,
                   bool per_sequence, float* cache, int64_t stride, const int64_t* first, int64_t past, bool naive,
                   float* scores, int64_t* index, float* weight, float* out, int threads);

}  // namespace deepseek
