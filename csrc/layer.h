#pragma once
#include "quantised.h"

namespace deepseek {

// Decoder layers whose matrices are quantised: x + attention(norm(x)), then + ffn(norm(…)); step by step they are the
// FusedMLA, FusedGate and modules of quant/. Pointers to what a model lacks are null; biases are added to their
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
// Layers one after the other. x [B, T, hidden] becomes their result. Layer i writes to and reads from the cache at
// i * layer_stride; cache, stride, cos, sin: as in mla_prepare; first: as in Past. What the gates decided goes to scores
// [B T, experts], index and weight [B T, top], one after the other for the layers that have a gate, or nowhere (null).
struct Decided {
  float* scores;
  int64_t* index;
  float* weight;
};
void layers_forward(const std::vector<Layer>& layers, float* x, int64_t batch, int64_t tokens, const float* cos,
                    const float* sin, bool per_sequence, float* cache, int64_t layer_stride, int64_t stride,
                    const int64_t* first, int64_t past, bool naive, const Decided& decided, int threads);

}  // namespace deepseek
