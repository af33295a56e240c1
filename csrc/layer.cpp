#include "layer.h"

#include <algorithm>

#include "attention.h"
#include "kernels.h"
#include "scratch.h"

namespace deepseek {
namespace {

thread_local Scratch block;  // of a block made of operations, which have their own
thread_local Scratch whole;  // of a layer made of blocks

void mla_forward(const Mla& m, const float* x, int64_t batch, int64_t tokens, const float* cos, const float* sin,
                 bool per_sequence, float* cache, int64_t stride, const int64_t* first, int64_t past, bool naive,
                 float* out, int threads) {
  const int64_t n = batch * tokens, width = m.heads * (m.nope + m.rope), latent = m.rank + m.rope;
  block.reserve(Scratch::room<float>(n * m.q_rank) * 2 + Scratch::room<float>(n * width) +
                Scratch::room<float>(n * latent) + Scratch::room<float>(n * m.heads * m.rope) +
                Scratch::room<float>(naive ? 0 : n * m.heads * m.rank) * 2 +
                Scratch::room<float>(n * m.heads * m.value) + Scratch::room<int64_t>(batch));
  auto add_bias = [&](float* y, const float* bias, int64_t rows) {
    if (bias)
      for (int64_t t = 0; t < n; ++t)
        for (int64_t i = 0; i < rows; ++i) y[t * rows + i] += bias[i];
  };
  float* q = block.take<float>(n * width);
  float* kv = block.take<float>(n * latent);
  if (m.q_rank) {
    float* a = block.take<float>(n * m.q_rank);
    float* normed = block.take<float>(n * m.q_rank);
    quantised_linears(x, n, m.hidden, {{m.q_a, m.q_rank, a}, {m.kv_a, latent, kv}}, m.bits, threads);
    add_bias(a, m.q_a_bias, m.q_rank);
    rms_norm(a, n, m.q_rank, m.q_rank, m.q_norm, m.q_eps, normed, threads);
    quantised_linears(normed, n, m.q_rank, {{m.q_b, width, q}}, m.bits, threads);
  } else {
    quantised_linears(x, n, m.hidden, {{m.q_b, width, q}, {m.kv_a, latent, kv}}, m.bits, threads);
  }
  add_bias(kv, m.kv_a_bias, latent);
  float* q_rope = block.take<float>(n * m.heads * m.rope);
  mla_prepare(q, kv, m.kv_norm, m.kv_eps, {cos, sin, per_sequence, m.interleaved}, batch, tokens, m.heads, m.nope,
              m.rope, m.rank, q_rope, cache, stride, past, threads);
  int64_t* pasts = block.take<int64_t>(batch);
  std::fill(pasts, pasts + batch, past);
  const Past seen{cache, stride, first, pasts, batch, tokens};
  float* values = block.take<float>(n * m.heads * m.value);
  if (naive) {
    mla_naive(q, q_rope, seen, m.heads, m.rank, m.rope, m.nope, m.value, m.kv_b, m.bits, m.scale, values, threads);
  } else {
    float* q_latent = block.take<float>(n * m.heads * m.rank);
    float* summed = block.take<float>(n * m.heads * m.rank);
    quantised_groups(q, n, m.heads, m.nope, width, m.nope + m.rope, m.key, m.rank / kRows * Panel(m.nope, 8).bytes, m.rank,
                     8, q_latent, threads);
    mla_absorbed(q_latent, q_rope, seen, m.heads, m.rank, m.rope, m.scale, summed, threads);
    const int64_t panel = Panel(m.rank, m.bits).bytes;
    quantised_groups(summed, n, m.heads, m.rank, m.heads * m.rank, m.rank, m.kv_b + m.nope / kRows * panel,
                     (m.nope + m.value) / kRows * panel, m.value, m.bits, values, threads);
  }
  quantised_linears(values, n, m.heads * m.value, {{m.o, m.hidden, out}}, m.bits, threads);
  add_bias(out, m.o_bias, m.hidden);
}

void ffn_forward(const Ffn& f, const float* x, int64_t tokens, int64_t hidden, float* scores, int64_t* index,
                 float* weight, float* out, int threads) {
  const int64_t experts = f.gate.experts, rows = panels_of(experts) * kRows;
  if (experts) {
    block.reserve(Scratch::room<float>(tokens * rows));
    float* logits = block.take<float>(tokens * rows);
    panel_linear(x, tokens, hidden, f.gate_weight, f.gate_bf16, rows, logits, threads);
    if (rows != experts)
      for (int64_t t = 1; t < tokens; ++t) std::copy_n(logits + t * rows, experts, logits + t * experts);
    choose_experts(logits, tokens, f.gate, f.gate_bias, scores, index, weight, threads);
  }
  quantised_experts(x, tokens, hidden, index, weight, f.gate.top, f.experts, experts, f.inner, f.shared, f.shared_inner,
                    f.bits, out, threads);
}

void add(float* y, const float* x, int64_t tokens, int64_t width, int threads) {
  in_pieces(tokens, 16, threads, [&](int64_t t) {
    for (int64_t i = t * width; i < (t + 1) * width; ++i) y[i] = y[i] + x[i];
  });
}

}  // namespace

void layers_forward(const std::vector<Layer>& layers, float* x, int64_t batch, int64_t tokens, const float* cos,
                    const float* sin, bool per_sequence, float* cache, int64_t layer_stride, int64_t stride,
                    const int64_t* first, int64_t past, bool naive, const Decided& decided, int threads) {
  const int64_t n = batch * tokens;
  int64_t hidden = 0, experts = 0, top = 0;
  for (const Layer& layer : layers)
    hidden = layer.mla.hidden, experts = std::max(experts, layer.ffn.gate.experts), top = std::max(top, layer.ffn.gate.top);
  whole.reserve(Scratch::room<float>(n * hidden) + Scratch::room<float>(n * experts) + Scratch::room<int64_t>(n * top) +
                Scratch::room<float>(n * top) + Scratch::room<float>(n * hidden));
  float* normed = whole.take<float>(n * hidden);
  float* y = whole.take<float>(n * hidden);
  Decided here = decided;
  if (!here.scores) here = {whole.take<float>(n * experts), whole.take<int64_t>(n * top), whole.take<float>(n * top)};
  for (const Layer& layer : layers) {
    rms_norm(x, n, hidden, hidden, layer.attention_norm, layer.eps, normed, threads);
    mla_forward(layer.mla, normed, batch, tokens, cos, sin, per_sequence, cache, stride, first, past, naive, y, threads);
    add(x, y, n, hidden, threads);
    rms_norm(x, n, hidden, hidden, layer.ffn_norm, layer.eps, normed, threads);
    ffn_forward(layer.ffn, normed, n, hidden, here.scores, here.index, here.weight, y, threads);
    add(x, y, n, hidden, threads);
    cache += layer_stride;
    if (const Gate& gate = layer.ffn.gate; decided.scores && gate.experts)
      here.scores += n * gate.experts, here.index += n * gate.top, here.weight += n * gate.top;
  }
}

}  // namespace deepseek
