#include "layer.h"

#include <algorithm>

#include "attention.h"
#include "kernels.h"
#include "scratch.h"

namespace deepseek {
namespace {

thread_local Scratch block;  // of a block made of operations, which have their own
thread_local Scratch whole;  // of a layer made of blocks

void mla_forward(const Mla& m, const float* x, const Sequences& sequences, int64_t naive, const float* cos,
                 const float* sin, float* cache, const LayerAdapters* adapters, const float* weight, float* out,
                 int threads) {
  const int64_t n = sequences.tokens(), width = m.heads * (m.nope + m.rope), latent = m.rank + m.rope;
  const int64_t first = sequences.begin[naive], later = n - first;  // tokens of naive, of absorbed attention
  block.reserve(Scratch::room<float>(n * m.q_rank) * 2 + Scratch::room<float>(n * width) +
                Scratch::room<float>(n * latent) + Scratch::room<float>(n * m.heads * m.rope) +
                Scratch::room<float>(later * m.heads * m.rank) * 2 + Scratch::room<float>(n * m.heads * m.value) +
                Scratch::room<int64_t>(sequences.count + 1));
  auto add_bias = [&](float* y, const float* bias, int64_t rows) {
    if (bias)
      for (int64_t t = 0; t < n; ++t)
        for (int64_t i = 0; i < rows; ++i) y[t * rows + i] += bias[i];
  };
  auto adapt = [&](std::vector<LowRank> LayerAdapters::*product, const float* x, int64_t columns, float* y,
                   int64_t rows) {
    if (adapters) add_low_rank(x, n, columns, adapters->*product, weight, rows, y, threads);
  };
  float* q = block.take<float>(n * width);
  float* kv = block.take<float>(n * latent);
  if (m.q_rank) {
    float* a = block.take<float>(n * m.q_rank);
    float* normed = block.take<float>(n * m.q_rank);
    quantized_linears(x, n, m.hidden, {{m.q_a, m.q_rank, a}, {m.kv_a, latent, kv}}, m.bits, threads);
    add_bias(a, m.q_a_bias, m.q_rank);
    adapt(&LayerAdapters::q_a, x, m.hidden, a, m.q_rank);
    rms_norm(a, n, m.q_rank, m.q_rank, m.q_norm, m.q_eps, normed, threads);
    quantized_linears(normed, n, m.q_rank, {{m.q_b, width, q}}, m.bits, threads);
    adapt(&LayerAdapters::q_b, normed, m.q_rank, q, width);
  } else {
    quantized_linears(x, n, m.hidden, {{m.q_b, width, q}, {m.kv_a, latent, kv}}, m.bits, threads);
    adapt(&LayerAdapters::q_b, x, m.hidden, q, width);
  }
  add_bias(kv, m.kv_a_bias, latent);
  adapt(&LayerAdapters::kv_a, x, m.hidden, kv, latent);
  float* q_rope = block.take<float>(n * m.heads * m.rope);
  mla_prepare(q, kv, m.kv_norm, m.kv_eps, {cos, sin, m.interleaved}, sequences, m.heads, m.nope, m.rope, m.rank, q_rope,
              cache, threads);
  float* values = block.take<float>(n * m.heads * m.value);
  if (naive)
    mla_naive(q, q_rope, cache, {naive, sequences.begin, sequences.past, sequences.block_begin, sequences.blocks},
              m.heads, m.rank, m.rope, m.nope, m.value, m.kv_b, m.bits, m.scale, values, threads);
  if (later) {
    float* q_latent = m.nope ? block.take<float>(later * m.heads * m.rank) : nullptr;
    float* summed = block.take<float>(later * m.heads * m.rank);
    int64_t* begin = block.take<int64_t>(sequences.count - naive + 1);
    for (int64_t s = naive; s <= sequences.count; ++s) begin[s - naive] = sequences.begin[s] - first;
    const Sequences rest{sequences.count - naive, begin, sequences.past + naive, sequences.block_begin + naive,
                         sequences.blocks};
    const int key_bits = std::max(m.bits, 8);
    if (m.nope)
      quantized_groups(q + first * width, later, m.heads, m.nope, width, m.nope + m.rope, m.key,
                       m.rank / kRows * Panel(m.nope, key_bits).bytes, m.rank, key_bits, q_latent, threads);
    mla_absorbed(q_latent, q_rope + first * m.heads * m.rope, cache, rest, m.heads, m.rank, m.rope, m.scale, summed,
                 threads);
    const int64_t panel = Panel(m.rank, m.bits).bytes;
    quantized_groups(summed, later, m.heads, m.rank, m.heads * m.rank, m.rank, m.kv_b + m.nope / kRows * panel,
                     (m.nope + m.value) / kRows * panel, m.value, m.bits, values + first * m.heads * m.value, threads);
  }
  quantized_linears(values, n, m.heads * m.value, {{m.o, m.hidden, out}}, m.bits, threads);
  add_bias(out, m.o_bias, m.hidden);
  adapt(&LayerAdapters::o, values, m.heads * m.value, out, m.hidden);
}

void gate_forward(const Ffn& f, const float* x, int64_t tokens, int64_t hidden, float* scores, int64_t* index,
                  float* weight, int threads) {
  float* logits = block.only(tokens * f.gate.experts);
  plain_linear(x, tokens, hidden, f.gate_weight, f.gate_bits, f.gate.experts, logits, threads);
  choose_experts(logits, tokens, f.gate, f.gate_bias, scores, index, weight, threads);
}

void add(float* y, const float* x, int64_t tokens, int64_t width, int threads) {
  in_pieces(tokens, 16, threads, [&](int64_t t) {
    for (int64_t i = t * width; i < (t + 1) * width; ++i) y[i] = y[i] + x[i];
  });
}

}  // namespace

void layers_forward(const std::vector<Layer>& layers, float* x, const Sequences& sequences, int64_t naive,
                    const float* cos, const float* sin, float* cache, int64_t layer_stride, const Decided& decided,
                    const Residency* residency, const LayerAdapters* adapters, const float* weight, int threads) {
  const int64_t n = sequences.tokens();
  int64_t hidden = 0, experts = 0, top = 0;
  for (const Layer& layer : layers)
    hidden = layer.mla.hidden, experts = std::max(experts, layer.ffn.gate.experts),
    top = std::max(top, layer.ffn.gate.top);
  whole.reserve(2 * (Scratch::room<float>(n * hidden) + Scratch::room<float>(n * experts) +
                     Scratch::room<int64_t>(n * top) + Scratch::room<float>(n * top)));
  float* normed = whole.take<float>(n * hidden);
  float* y = whole.take<float>(n * hidden);
  auto take = [&] {
    return Decided{whole.take<float>(n * experts), whole.take<int64_t>(n * top), whole.take<float>(n * top)};
  };
  const Decided ahead = take();
  Decided here = decided.scores ? decided : take();
  int64_t moe_layer = 0;
  for (const Layer& layer : layers) {
    const Ffn& ffn = layer.ffn;
    rms_norm(x, n, hidden, hidden, layer.attention_norm, layer.eps, normed, threads);
    mla_forward(layer.mla, normed, sequences, naive, cos, sin, cache, adapters, weight, y, threads);
    if (adapters) ++adapters;
    add(x, y, n, hidden, threads);
    Fetch fetch;
    if (residency && ffn.gate.experts) {
      const Layer* next = &layer + 1;
      bool ahead_too = residency->on_prefetch && next < layers.data() + layers.size() && next->ffn.gate.experts;
      fetch = [&, moe_layer, ahead_too](const std::vector<int64_t>& wanted) mutable {
        std::vector<int64_t> ready = residency->fetch(moe_layer, ffn.experts, wanted);
        if (ahead_too) {  // what the next gate says of this layer's input is most of what it will say of its own
          rms_norm(x, n, hidden, hidden, next->ffn_norm, next->eps, y, threads);
          gate_forward(next->ffn, y, n, hidden, ahead.scores, ahead.index, ahead.weight, threads);
          residency->prefetch(moe_layer + 1, next->ffn.experts, next->ffn.gate.experts, ahead.index,
                              n * next->ffn.gate.top);
          ahead_too = false;
        }
        return ready;
      };
    }
    rms_norm(x, n, hidden, hidden, layer.ffn_norm, layer.eps, normed, threads);
    if (ffn.gate.experts) gate_forward(ffn, normed, n, hidden, here.scores, here.index, here.weight, threads);
    quantized_experts(normed, n, hidden, here.index, here.weight, ffn.gate.top, ffn.experts, ffn.gate.experts,
                      ffn.inner, ffn.shared, ffn.shared_inner, ffn.bits, y, threads, fetch);
    add(x, y, n, hidden, threads);
    cache += layer_stride;
    moe_layer += ffn.gate.experts > 0;
    if (const Gate& gate = ffn.gate; decided.scores && gate.experts)
      here.scores += n * gate.experts, here.index += n * gate.top, here.weight += n * gate.top;
  }
}

void Residency::prefetch(int64_t moe_layer, const uint8_t* const* experts, int64_t count, const int64_t* index,
                         int64_t slots) const {
  std::vector<int64_t> votes(count, 0), likely;
  for (int64_t i = 0; i < slots; ++i)
    if (votes[index[i]]++ == 0) likely.push_back(index[i]);
  if (std::all_of(likely.begin(), likely.end(), [&](int64_t e) { return experts[e] != nullptr; })) return;
  std::stable_sort(likely.begin(), likely.end(), [&](int64_t a, int64_t b) { return votes[a] > votes[b]; });
  on_prefetch(moe_layer, likely);
}

std::vector<int64_t> Residency::fetch(int64_t moe_layer, const uint8_t* const* experts,
                                      const std::vector<int64_t>& wanted) const {
  const bool all = std::all_of(wanted.begin(), wanted.end(), [&](int64_t e) { return experts[e] != nullptr; });
  return all ? wanted : on_fetch(moe_layer, wanted);
}

}  // namespace deepseek
