// What an instruction set provides. One table each; dispatch.cpp picks one at run time.
//
// Shared arithmetic, the same bits from every table (scalar.cpp is its plainest reading):
//   activations   per row: scale = absmax / 127, q = round to nearest even of x * (127 / absmax)
//   block sums    int32, exact: LEVEL[code] * q over 64 columns
//   a row         acc = fma(scale[b], blocksum[b], acc), b ascending, fp32; times (step * activation scale) at the end
//   8-bit weights one int32 sum over all columns, converted once
// So a token's result does not depend on the tokens beside it, on the thread count or on the machine.
#pragma once
#include <cstddef>
#include <cstdint>

namespace deepseek {

constexpr int kRows = 16;    // output rows of a panel
constexpr int kBlock = 64;   // columns that share a scale
constexpr int64_t kKeys = 128;  // of a block of attention; blocks count from the first visible position

// Levels of the NF4 codebook in units of 1/127 (arXiv 2305.14314, appendix E).
constexpr int8_t kLevels[16] = {-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127};

inline int64_t blocks_of(int64_t columns) { return (columns + kBlock - 1) / kBlock; }
// Bytes from one row of activations to the next: an odd number of cache lines, so that rows do not share their sets.
inline int64_t pitch_of(int64_t blocks) { return (blocks | 1) * kBlock; }
inline int64_t panels_of(int64_t rows) { return (rows + kRows - 1) / kRows; }

// Where the parts of a panel lie (docs/formats.md). 16 or 32 bits are BF16 and FP32: sixteen rows of a plain matrix.
struct Panel {
  int64_t blocks, codes, bytes;
  Panel(int64_t columns, int bits)
      : blocks(blocks_of(columns)),
        codes(bits > 8 ? 0 : 64 + (bits == 4 ? (16 * blocks + 63) / 64 * 64 : 0)),
        bytes(bits > 8 ? kRows * columns * bits / 8 : codes + (bits == 4 ? 512 : 1024) * blocks) {}
};

// Activations quantized by row, or as they are for weights of 16 or 32 bits: then x [rows][columns] alone.
struct Rows {
  const int8_t* q;         // [rows][pitch_of(blocks)]
  const int32_t* surplus;  // [rows][blocks]: -128 times the sum of q over the block, for unsigned weights
  const float* scale;    // [rows]
  int64_t blocks;
  const float* x = nullptr;
  int64_t columns = 0;
};

// A block of at most kKeys keys and their values: rows `stride` numbers apart; `width` is a multiple of 8.
struct Keys {
  const float *key, *value;
  int64_t stride, count, depth, width;
};

struct Kernels {
  const char* name;

  // One row of weights -> its place r in a panel (which holds zeros), as quant/nf4.py and quant/int8.py say. Adds the
  // squared error and the squared weights to `squares`. room: 3 * (columns + 64) floats.
  void (*quantize_weights)(const float* w, int64_t columns, int bits, int64_t r, uint8_t* panel, float* room,
                           double* squares);

  // One row of activations: x [columns] -> q (padded with zeros to whole blocks), sums, scale.
  void (*quantize)(const float* x, int64_t columns, int8_t* q, int32_t* surplus, float* scale);

  // `count` panels, one after the other at w, times the `tokens` rows row[0], row[1], … of x (null: 0, 1, …).
  // plain: out[t * ld + 16 * panel + r]. gated: panels come in pairs (gate, up) and
  // out[t * ld + 16 * pair + r] = silu(gate) * up.
  void (*panels)(const uint8_t* w, int64_t count, int bits, bool gated, const Rows& x, const int32_t* row,
                 int64_t tokens, float* out, int64_t ld);

  // Plain weights, BF16 or FP32, `rows` rows of x.columns numbers: out[t * ld + r] = w_r · x_row[t], or, where `up` is
  // not null, silu(w_r · x_row[t]) * (up_r · x_row[t]). Sums are FP32, 64 of every row, added at the end.
  void (*bf16_rows)(const uint16_t* w, const uint16_t* up, int64_t rows, const Rows& x, const int32_t* row,
                    int64_t tokens, float* out, int64_t ld);
  void (*fp32_rows)(const float* w, const float* up, int64_t rows, const Rows& x, const int32_t* row, int64_t tokens,
                    float* out, int64_t ld);

  // out = x / sqrt(mean(x^2) + eps) * w
  void (*rms_norm)(const float* x, const float* w, int64_t width, float eps, float* out);

  // out = (add ? add : 0) + sum over i of weight[i] * y[i][…], i ascending
  void (*weighted_sum)(const float* const* y, const float* weight, int64_t count, const float* add, int64_t width,
                       float* out);

  // One block of attention for `queries` groups of 16 lanes, each a query's vector q[i] [depth][16]. Lane l of group i
  // sees the first count[i] keys, with `ramp` l more (16 queries in a row); no group sees fewer than the one before it,
  // and each lane sees something in one of its blocks. part[i] gets the lanes' largest scores [16], the sums of
  // exp(score - largest) [16], and those of the values [width][16]; a lane that sees nothing: -inf and zeros.
  void (*attention_block)(const float* const* q, int64_t queries, const Keys& keys, const int64_t* count, bool ramp,
                          float scale, float* const* part);

  // Joins the parts of `count` blocks in their order into `rows` rows of out [.][ld], one a lane: sum over blocks of
  // exp(largest_i - max) sum_i / norm.
  void (*attention_join)(const float* const* part, int64_t count, int64_t width, int64_t rows, float* out, int64_t ld);
};

// Null where the compiler could not build the table.
extern const Kernels* const scalar_kernels;
extern const Kernels* const avx2_kernels;
extern const Kernels* const avx512_kernels;
extern const Kernels* const amx_kernels;

// Whether this machine has what a table needs; false for null.
bool runs_here(const Kernels* table);

// The best table of this machine, or the one named by DEEPSEEK_ISA. Throws std::runtime_error where that cannot be.
const Kernels& kernels();

}  // namespace deepseek
