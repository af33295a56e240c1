// Training: matrix products that take BF16 or FP32 operands as they lie in memory (widened, rounded, gathered or
// transposed while they are packed), and the passes between them.
//
//   FP32 units  blocks of inner columns; within a block one chain of fused multiply-adds, blocks added in order
//   BF16        operands rounded to BF16, products and sums in FP32, the result rounded once (ops/linear.py)
//   BF16 units  the same on AVX512-BF16 or AMX, in the order of their instructions (training_pairs.h); what one product
//               of an operation leaves for the next is rounded to BF16 as well
//
// Every sum has one order: results do not depend on the thread count, nor on the instruction set that provides FP32 units.
#pragma once
#include <cstdint>

#include "moments.h"

namespace deepseek {

constexpr int64_t kDepth = 192;  // of a block on FP32 units: part of the arithmetic
constexpr int64_t kColumns = 384;  // result columns at a time: a block of so many stays in the second cache

enum Kind : int { kFloat = 0, kBf16 = 1, kRounded = 2 };  // kRounded: FP32 in memory, rounded to BF16 on the way in

inline int64_t bytes_of(Kind kind) { return kind == kBf16 ? 2 : 4; }

// A matrix as it lies in memory: row r starts at element (index ? index[r] : r) * stride.
struct Matrix {
  const void* data;
  int64_t stride;
  Kind kind;
  const int64_t* index = nullptr;
};

// How matrices are multiplied.
struct Products {
  const char* name;
  int64_t rows, columns;  // of the tile that is summed in registers
  int64_t depth;  // inner columns of a block
  int64_t strip;  // bytes of a packed strip of the left factor: tile rows x depth
  int64_t bytes;  // of a packed number
  int64_t together;  // inner columns that an instruction takes: a block is filled up to them with zeros

  // rows first_row … of the left factor as strips [rows / tile rows][strip]. Element (row, k) of the factor is element
  // (row, k) of the matrix, (k, row) where transposed.
  void (*pack_left)(const Matrix& a, bool transposed, int64_t first_row, int64_t rows, int64_t first_k, int64_t depth,
                    void* out);
  // The right factor as panels [columns / tile columns][depth][tile columns]; element (k, n) likewise.
  void (*pack_right)(const Matrix& b, bool transposed, int64_t first_k, int64_t depth, int64_t first_n, int64_t columns,
                     void* out);
  // out [rows][ld] (+)= a packed strip (one tile's rows at most) times packed panels, `panel` bytes apart.
  void (*multiply)(const void* a, bool transposed, int64_t rows, const void* b, int64_t panel, int64_t depth,
                   int64_t columns, float* out, int64_t ld, bool add);
};

// What an instruction set provides for training; that of AVX-512 also serves machines with AMX.
struct TrainingKernels {
  Products products;  // on FP32 units

  // out = x * scale
  void (*scaled)(const float* x, int64_t count, float scale, void* out, Kind kind);
  // out = sum of `count` rows, in their order.
  void (*sum_rows)(const float* const* rows, int64_t count, int64_t width, void* out, Kind kind);

  // SwiGLU. h = silu(gate) * up * weight; gate and up and h of one kind, except that `h` may stay FP32.
  void (*gated)(const void* gate, const void* up, Kind kind, float weight, int64_t width, void* h, Kind h_kind);
  // From dh: d_gate, d_up; where `hw` is given also hw = h * weight, and the result is sum(dh * h). out_kind: of these.
  float (*gated_back)(const void* dh, const void* gate, const void* up, Kind kind, Kind dh_kind, float weight,
                      int64_t width, void* d_gate, void* d_up, Kind out_kind, void* hw);

  // One row of logits -> its loss; where `gradient`, the row becomes (softmax - one hot) * scale, of `kind` and from where
  // it began.
  float (*cross_entropy)(float* logits, int64_t width, int64_t label, float scale, bool gradient, Kind kind);

  // One row of scores: the first `live`, times scale > 0, become probabilities (in place, rounded to BF16 where `kind`
  // says so and copied to `saved`), the rest up to `width` zeros.
  void (*softmax)(float* scores, float scale, int64_t live, int64_t width, void* saved, Kind kind);
  // ds = p * (dp - sum(p * dp)), in dp's place, over the first `live`; zeros up to `width`.
  void (*softmax_back)(const void* p, Kind kind, float* dp, int64_t live, int64_t width);

  // y = x * r rounded, times w (rounded): returns r = 1 / rms(x).
  float (*norm)(const void* x, Kind kind, const float* w, int64_t width, float eps, void* y);
  // dx from dy; dw += dy * x * r.
  void (*norm_back)(const void* x, const void* dy, Kind kind, const float* w, float r, int64_t width, void* dx,
                    float* dw);

  // Rotary embedding of one row of pairs, (0, 1), (2, 3), … or, not interleaved, (0, P), (1, P + 1), …; the result as two
  // halves. back: from the gradient of the result to that of x.
  void (*rotate)(const void* x, Kind kind, const float* cos, const float* sin, int64_t pairs, bool interleaved,
                 bool back, void* out);

  // One whole block of moments.h; place: of its first number in the tensor.
  void (*adamw8_block)(float* weight, const float* gradient, uint32_t place, uint8_t* first, float* first_scale,
                       uint8_t* second, float* second_scale, const AdamwStep& step);
  void (*adamw8_bf16_block)(uint16_t* weight, const uint16_t* gradient, uint32_t place, uint8_t* first,
                            float* first_scale, uint8_t* second, float* second_scale, const AdamwStep& step);
  void (*moved_block)(uint16_t* weight, const float* by, uint32_t place, float decay, float size, uint32_t seed);
  void (*momentum8_block)(const float* gradient, int8_t* momentum, float* scale, float beta, float rest, float* ahead);

  // One row of two_bits.h, its codes a byte each; `count` bytes of four codes; and back, from code `first` on.
  bool (*two_bits_row)(const float* value, const float* less, const float* error, float decay, int64_t row,
                       float* wanted, uint8_t* payload, uint8_t* code, float* left);
  void (*pack_two_bits)(const uint8_t* code, int64_t count, uint8_t* packed);
  void (*of_two_bits_row)(const uint8_t* payload, float weight, const uint8_t* packed, int64_t first, int64_t row,
                          bool add, float* out);
};

extern const TrainingKernels* const scalar_training;
extern const TrainingKernels* const avx2_training;
extern const TrainingKernels* const avx512_training;

// On BF16 units. Null where the compiler could not build them.
extern const Products* const avx512_bf16_products;
extern const Products* const amx_bf16_products;

// Those of the instruction set in use (kernels.h). bf16_units: null where it has none; bf16_products: or where they are
// switched off.
const TrainingKernels& training_kernels();
const Products* bf16_units();
const Products* bf16_products();
void use_bf16_units(bool on);

// Everything below: `threads` at most, memory of this machine, shapes checked by the caller.

// out [rows][columns] = a b; `add`, for FP32 results alone: += a b
void product(const Matrix& a, bool a_transposed, const Matrix& b, bool b_transposed, int64_t rows, int64_t columns,
             int64_t inner, void* out, int64_t ld, Kind out_kind, bool add, int threads);

// One layer's routed experts over pairs sorted by expert (ops/experts.py). token, weight: [pairs]; ends: [experts], where
// each one's pairs end; slot: [tokens][top], the pairs of a token, -1 for none.
struct Experts {
  int64_t tokens, hidden, top, pairs, experts, inner;
  const int64_t *token, *ends, *slot;
  const float* weight;
  const void *x, *w_in, *w_out;  // [tokens][hidden]; [experts][2 inner][hidden]; [experts][hidden][inner]
  Kind kind, w_kind;  // of x and the results; of the weights as factors
};
// both: [pairs][2 inner] of `kind`, kept for the gradient, or null. out: [tokens][hidden].
void experts_forward(const Experts& e, void* both, void* out, int threads);
// Null results are not wanted.
void experts_backward(const Experts& e, const void* both, const void* dout, void* dx, float* d_weight, void* d_in,
                      void* d_out, int threads);

// [batch][heads][rows][width] with the widths side by side and any other steps (in elements).
struct Heads {
  void* data;
  int64_t batch_step, head_step, row_step, width;
};
// Causal softmax attention; probs [batch][heads][length][length] of `kind` is kept for the gradient.
void attention_forward(const Heads& q, const Heads& k, const Heads& v, const Heads& out, Kind kind, int64_t batch,
                       int64_t heads, int64_t length, float scale, void* probs, int threads);
void attention_backward(const Heads& q, const Heads& k, const Heads& v, const Heads& dout, const Heads& dq,
                        const Heads& dk, const Heads& dv, Kind kind, int64_t batch, int64_t heads, int64_t length,
                        float scale, const void* probs, int threads);

// loss [rows] of a linear head, 0 where the label is negative; dx [rows][hidden] and dw [vocab][hidden], FP32, of the sum
// times `scale`, where not null. `chunk` rows of logits are held at a time.
void head_loss(const void* x, Kind kind, const void* w, Kind w_kind, const int64_t* label, int64_t rows, int64_t hidden,
               int64_t vocab, float scale, int64_t chunk, float* loss, float* dx, float* dw, int threads);

void norm_forward(const void* x, Kind kind, const float* w, int64_t rows, int64_t width, float eps, void* y, float* r,
                  int threads);
// parts: [(rows + 63) / 64][width], scratch; dw [width]
void norm_backward(const void* x, const void* dy, Kind kind, const float* w, const float* r, int64_t rows,
                   int64_t width, void* dx, float* parts, float* dw, int threads);

// Row r of sequence b takes cosines and sines [x.width / 2] from b * batch_step + r * row_step on.
void rotate(const Heads& x, const Heads& out, Kind kind, const float* cos, const float* sin, int64_t batch_step,
            int64_t row_step, int64_t batch, int64_t heads, int64_t length, bool interleaved, bool back, int threads);

void swiglu_forward(const void* gate, const void* up, Kind kind, int64_t count, void* h, int threads);
void swiglu_backward(const void* dh, const void* gate, const void* up, Kind kind, int64_t count, void* d_gate,
                     void* d_up, int threads);

}  // namespace deepseek
