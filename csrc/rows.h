// Rows of activations as the kernels want them, and panels of one matrix applied to them.
#pragma once
#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "scratch.h"

namespace deepseek {

// Activations of `rows` rows in scratch memory, as weights of so many bits want them; to be filled by `fill`.
struct Activations {
  int8_t* q = nullptr;
  int32_t* surplus = nullptr;
  float* scale = nullptr;
  float* x = nullptr;
  int64_t columns, blocks;
  static size_t room(int64_t rows, int64_t columns, int bits) {
    if (bits > 8) return Scratch::room<float>(rows * columns);
    int64_t blocks = blocks_of(columns);
    return Scratch::room<int8_t>(rows * pitch_of(blocks)) + Scratch::room<int32_t>(rows * blocks) +
           Scratch::room<float>(rows);
  }
  Activations(Scratch& scratch, int64_t rows, int64_t columns, int bits) : columns(columns), blocks(blocks_of(columns)) {
    if (bits > 8) {
      x = scratch.take<float>(rows * columns);
      return;
    }
    q = scratch.take<int8_t>(rows * pitch_of(blocks)), surplus = scratch.take<int32_t>(rows * blocks);
    scale = scratch.take<float>(rows);
  }
  void fill(int64_t row, const float* from) const {
    if (x)
      std::memcpy(x + row * columns, from, sizeof(float) * columns);
    else
      kernels().quantize(from, columns, q + row * pitch_of(blocks), surplus + row * blocks, scale + row);
  }
  Rows rows(int64_t first = 0) const {
    if (x) return {nullptr, nullptr, nullptr, blocks, x + first * columns, columns};
    return {q + first * pitch_of(blocks), surplus + first * blocks, scale + first, blocks};
  }
};

// Plain weights of 16 or 32 bits (kernels.h).
inline void plain_rows(const uint8_t* w, const uint8_t* up, int64_t rows, int bits, const Rows& x, const int32_t* row,
                       int64_t tokens, float* out, int64_t ld) {
  if (bits == 16)
    kernels().bf16_rows((const uint16_t*)w, (const uint16_t*)up, rows, x, row, tokens, out, ld);
  else
    kernels().fp32_rows((const float*)w, (const float*)up, rows, x, row, tokens, out, ld);
}

// Panels write whole sixteens; a matrix whose rows are no multiple of 16 gets its last panel from a buffer.
struct Target {
  float* out;
  int64_t ld, rows;
};

// `count` panels of a matrix from panel `from` on, times `tokens` rows of activations.
inline void panels_into(const uint8_t* w, const Panel& shape, int64_t from, int64_t count, int bits, const Rows& x,
                        int64_t tokens, const Target& to) {
  if (bits > 8)
    return plain_rows(w + from * shape.bytes, nullptr, std::min(count * kRows, to.rows - from * kRows), bits, x, nullptr,
                      tokens, to.out + from * kRows, to.ld);
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
