#pragma once
#include "attention.h"
#include "low_rank.h"
#include "quantized.h"

namespace deepseek {

// Decoder layers: x + attention(norm(x)), then + ffn(norm(…)); step by step they are
// what quant/native_stack.py runs. Pointers to what a model lacks are null; biases are added to their
// products.
struct Mla {
  int64_t hidden, heads, nope, rope, rank, value, q_rank;  // q_rank 0: `q_b` is q_proj
  int bits;
  const uint8_t *q_a, *q_b, *kv_a, *kv_b, *o;
  const float *q_norm, *kv_norm, *q_a_bias, *kv_a_bias, *o_bias;
  float q_eps, kv_eps, scale;
  // the key half of kv_b, transposed for absorbed attention: per head [rank, nope], or null; in 8 bits where the weights
  // are quantized
  const uint8_t* key;
  bool interleaved;
};
struct Ffn {
  int64_t inner, shared_inner;
  int bits;
  Gate gate;                // no experts: a dense layer, whose MLP is `shared`
  const uint8_t* gate_weight;  // plain
  int gate_bits;
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
// What adapters add beside a layer's products: of each product all of them, weight [T, adapters] of the tokens.
struct LayerAdapters {
  std::vector<LowRank> q_a, q_b, kv_a, o;
};
// Where not all experts are in memory: the table of a layer's experts holds null for those that are not. `fetch` loads at
// least one of the wanted experts and pins them until the next call for that layer; `prefetch` is optional: it names what
// the next layer will probably want, most wanted first, where not all of it is resident. moe_layer counts the layers that
// have a gate.
struct Residency {
  std::function<std::vector<int64_t>(int64_t moe_layer, const std::vector<int64_t>& wanted)> on_fetch;
  std::function<void(int64_t moe_layer, const std::vector<int64_t>& wanted)> on_prefetch;

  std::vector<int64_t> fetch(int64_t moe_layer, const uint8_t* const* experts,
                             const std::vector<int64_t>& wanted) const;
  void prefetch(int64_t moe_layer, const uint8_t* const* experts, int64_t count, const int64_t* index,
                int64_t slots) const;
};
// Layers one after the other. x [T, hidden] becomes their result. The first `naive` sequences run naive, the
// others absorbed. cos, sin: as in mla_prepare. Layer i's rows of the cache begin at i * layer_stride. What the gates
// decided goes to scores [T, experts], index and weight [T, top], one after the other for the layers that have a gate, or
// nowhere (null). residency: null where all experts are in memory. adapters: of every layer, null where there are none.
struct Decided {
  float* scores;
  int64_t* index;
  float* weight;
};
void layers_forward(const std::vector<Layer>& layers, float* x, const Sequences& sequences, int64_t naive,
                    const float* cos, const float* sin, float* cache, int64_t layer_stride, const Decided& decided,
                    const Residency* residency, const LayerAdapters* adapters, const float* weight, int threads);

}  // namespace deepseek
