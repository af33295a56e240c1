// Operations on quantized weights, for whole batches, on all threads. Pointers are not checked here: ops/ did that.
// x and out are FP32, rows contiguous. 16 or 32 bits: plain weights in BF16 or FP32, row after row.
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

namespace deepseek {

// A matrix [rows, columns] -> panels, which must hold zeros; squares: the squared error and the squared weights.
void quantize_panels(const float* w, int64_t rows, int64_t columns, int bits, uint8_t* out, double* squares,
                     int threads);

// out [tokens][rows] = x W^T for each of some matrices with the same columns.
struct Product {
  const uint8_t* w;
  int64_t rows;
  float* out;
};
void quantized_linears(const float* x, int64_t tokens, int64_t columns, const std::vector<Product>& products, int bits,
                       int threads);

// out[t, g, :] = W_g x[t, g, :] for `groups` matrices of `rows` x `columns` that begin `stride` bytes apart; x[t, g] begins
// at t * token_stride + g * group_stride.
void quantized_groups(const float* x, int64_t tokens, int64_t groups, int64_t columns, int64_t token_stride,
                      int64_t group_stride, const uint8_t* w, int64_t stride, int64_t rows, int bits, float* out,
                      int threads);

// out[t] = sum over k of weight[t, k] * mlp(expert index[t, k])(x[t]), k ascending, plus shared(x[t]) where given.
// experts[e]: one packed gated MLP each; where weights are plain, the addresses of its gate, up and down. top = 0 and a shared MLP: that MLP alone. fetch, where given: makes some of the
// experts asked for ready, at least one, and returns them; it is asked for the others when those are done with.
using Fetch = std::function<std::vector<int64_t>(const std::vector<int64_t>& wanted)>;
void quantized_experts(const float* x, int64_t tokens, int64_t hidden, const int64_t* index, const float* weight,
                       int64_t top, const uint8_t* const* experts, int64_t num_experts, int64_t inner,
                       const uint8_t* shared, int64_t shared_inner, int bits, float* out, int threads,
                       const Fetch& fetch = nullptr);

// out[t, :] = W x[t, :] with plain weights of 16 or 32 bits.
void plain_linear(const float* x, int64_t tokens, int64_t columns, const uint8_t* w, int bits, int64_t rows, float* out,
                  int threads);

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

}  // namespace deepseek
