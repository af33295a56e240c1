// Rows of activations as the kernels want them, and panels of one matrix applied to them.
#pragma once
#include <cstring>

#include "kernels.h"
#include "scratch.h"

namespace deepseek {

// Activations of `rows` rows in scratch memory, to be filled by `fill`.
struct QuantizedRows {
  int8_t* q;
  int32_t* surplus;
  float* scale;
  int64_t blocks;
  static size_t room(int64_t rows, int64_t columns) {
    int64_t blocks = blocks_of(columns);
    return Scratch::room<int8_t>(rows * pitch_of(blocks)) + Scratch::room<int32_t>(rows * blocks) +
           Scratch::room<float>(rows);
  }
  QuantizedRows(Scratch& scratch, int64_t rows, int64_t columns) : blocks(blocks_of(columns)) {
    q = scratch.take<int8_t>(rows * pitch_of(blocks)), surplus = scratch.take<int32_t>(rows * blocks);
    scale = scratch.take<float>(rows);
  }
  void fill(int64_t row, const float* x, int64_t columns) const {
    kernels().quantize(x, columns, q + row * pitch_of(blocks), surplus + row * blocks, scale + row);
  }
  Rows rows(int64_t first = 0) const {
    return {q + first * pitch_of(blocks), surplus + first * blocks, scale + first, blocks};
  }
};

// Panels write whole sixteens; a matrix whose rows are no multiple of 16 gets its last panel from a buffer.
struct Target {
  float* out;
  int64_t ld, rows;
};

// `count` panels of a matrix from panel `from` on, times `tokens` rows of activations.
inline void panels_into(const uint8_t* w, const Panel& shape, int64_t from, int64_t count, int bits, const Rows& x,
                        int64_t tokens, const Target& to) {
  const Kernels& k = kernels();
  bool cut = (from + count) * kRows > to.rows;
  int64_t whole = cut ? count - 1 : count;
  if (whole) k.panels(w + from * shape.bytes, whole, bits, false, x, nullptr, tokens, to.out + from * kRows, to.ld);
  if (!cut) return;
  constexpr int64_t kSome = 64;
  alignas(64) float last[kSome * kRows];
  int64_t start = (from + whole) * kRows;
  for (int64_t t = 0; t < tokens; t += kSome) {
    int64_t n = std::min(kSome, tokens - t);
    Rows part = x;
    part.q += t * pitch_of(x.blocks), part.surplus += t * x.blocks, part.scale += t;
    k.panels(w + (from + whole) * shape.bytes, 1, bits, false, part, nullptr, n, last, kRows);
    for (int64_t i = 0; i < n; ++i)
      std::memcpy(to.out + (t + i) * to.ld + start, last + i * kRows, sizeof(float) * (to.rows - start));
  }
}

}  // namespace deepseek
