// The plainest form of the shared arithmetic: the twin that the fast tables are compared with, and what runs where there
// is no other.
#include "attention_lanes.h"

namespace deepseek {
namespace {

int weight(const uint8_t* codes, int bits, int64_t row, int64_t column) {
  int64_t block = column / kBlock, k = column % kBlock;
  if (bits == 8) return (int8_t)codes[1024 * block + 64 * (k / 4) + 4 * row + k % 4];
  uint8_t both = codes[512 * block + 64 * (k / 8) + 4 * row + k % 4];
  return kLevels[k % 8 < 4 ? both & 15 : both >> 4];
}

float product(const uint8_t* panel, const Panel& shape, int bits, int64_t r, const Rows& x, int64_t row) {
  const int8_t* q = x.q + row * pitch_of(shape.blocks);
  const uint8_t* codes = panel + shape.codes;
  float acc = 0.0f;
  int32_t sum = 0;
  for (int64_t b = 0; b < shape.blocks; ++b) {
    for (int64_t k = b * kBlock; k < (b + 1) * kBlock; ++k) sum += weight(codes, bits, r, k) * q[k];
    if (bits == 4) {
      acc = __builtin_fmaf((float)panel[64 + 16 * b + r], (float)sum, acc);
      sum = 0;
    }
  }
  float step;
  std::memcpy(&step, panel + 4 * r, 4);
  return (bits == 4 ? acc : (float)sum) * (step * x.scale[row]);
}

void panels(const uint8_t* w, int64_t count, int bits, bool gated, const Rows& x, const int32_t* row, int64_t tokens,
            float* out, int64_t ld) {
  const Panel shape(x.blocks * kBlock, bits);
  for (int64_t p = 0; p < count; p += gated ? 2 : 1)
    for (int64_t t = 0; t < tokens; ++t) {
      f16 y[2];
      for (int i = 0; i <= gated; ++i)
        for (int r = 0; r < kRows; ++r)
          y[i][r] = product(w + (p + i) * shape.bytes, shape, bits, r, x, row ? row[t] : t);
      store(out + t * ld + (gated ? 8 : 16) * p, gated ? silu(y[0]) * y[1] : y[0]);
    }
}

const Kernels table = {
    "scalar", quantize_weights, quantize,     panels,          dense_rows<uint16_t>, dense_rows<float>,
    rms_norm, weighted_sum,     attention_block, attention_join};

}  // namespace
const Kernels* const scalar_kernels = &table;
}  // namespace deepseek
