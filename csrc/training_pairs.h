// Matrix products on BF16 units: what csrc/training_avx512_bf16.cpp and csrc/training_amx.cpp share. Their instructions
// take inner columns in pairs, so a packed number is a pair of BF16 numbers in 32 bits, the even column in the low half:
//
//   left     strips of tile rows, kRowStride pairs from one to the next
//   right    panels [pairs][kTileColumns]
//
// Either factor comes from rows of pairs as they lie or from two rows interleaved, and is transposed where the other
// order is wanted. Inner columns are filled with zeros up to kTogether.
#pragma once
#include "training_access.h"

namespace deepseek {
namespace {

constexpr int64_t kTogether = 32;  // inner columns of a row of tiles
constexpr int64_t kTileColumns = 32;
constexpr int64_t kPairDepth = 384;  // inner columns of a block
constexpr int64_t kRowStride = kPairDepth / 2 + 16;  // pairs: an odd number of cache lines

typedef uint32_t u16 __attribute__((vector_size(64), aligned(64)));

inline int64_t pairs_of(int64_t depth) { return (depth + kTogether - 1) / kTogether * kTogether / 2; }

// Sixteen pairs of a row, from column k on; zeros past `count` columns.
template <Kind K>
INLINE i16 along(const void* row, int64_t k, int64_t count) {
  if (K == kBf16) {
    const __mmask32 some = count >= 32 ? ~0u : (1u << count) - 1;
    return (i16)_mm512_maskz_loadu_epi16(some, (const uint16_t*)row + k);
  }
  const __m256i low = _mm512_cvtepi32_epi16((__m512i)((u16)get<kRounded>(row, k, count) >> 16));
  if (count <= 16) return (i16)_mm512_zextsi256_si512(low);
  const __m256i high = _mm512_cvtepi32_epi16((__m512i)((u16)get<kRounded>(row, k + 16, count - 16) >> 16));
  return (i16)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// The pairs of sixteen columns of two rows, from column n on; zeros past `count` columns.
template <Kind K>
INLINE i16 across(const void* even, const void* odd, int64_t n, int64_t count) {
  const u16 a = (u16)(i16)get<K == kBf16 ? kBf16 : kRounded>(even, n, count);
  const u16 b = odd ? (u16)(i16)get<K == kBf16 ? kBf16 : kRounded>(odd, n, count) : u16{};
  return (i16)(a >> 16 | b);
}

// Pairs k, k + 2, … k + 30 of sixteen columns: v[i] of pair i; zeros past `depth`.
template <Kind K>
INLINE void sixteen_pairs(const Matrix& m, int64_t first_k, int64_t k, int64_t depth, int64_t n, int64_t count,
                          f16* v) {
  for (int64_t i = 0; i < 16; ++i) {
    const int64_t even = k + 2 * i;
    if (even < depth)
      v[i] = (f16)across<K>(row_of<K>(m, first_k + even), even + 1 < depth ? row_of<K>(m, first_k + even + 1) : nullptr,
                            n, count);
    else
      v[i] = f16{};
  }
}

INLINE void store_pairs(void* to, i16 v) { store((float*)to, (f16)v); }

template <int64_t ROWS>
void pack_left(const Matrix& a, bool transposed, int64_t first_row, int64_t rows, int64_t first_k, int64_t depth,
               void* packed) {
  auto place = [&](int64_t r) { return (uint32_t*)packed + r * kRowStride; };
  with_kind(a.kind, [&](auto kind) {
    constexpr Kind K = decltype(kind)::value;
    if (transposed)
      for (int64_t k = 0; k < depth; k += kTogether)
        for (int64_t r = 0; r < rows; r += 16) {
          f16 v[16];
          sixteen_pairs<K>(a, first_k, k, depth, first_row + r, rows - r, v);
          transpose(v);
          for (int64_t i = 0; i < 16 && r + i < rows; ++i) store_pairs(place(r + i) + k / 2, (i16)v[i]);
        }
    else
      for (int64_t r = 0; r < rows; ++r) {
        const void* row = row_of<K>(a, first_row + r);
        uint32_t* to = place(r);
        for (int64_t k = 0; k < depth; k += kTogether) store_pairs(to + k / 2, along<K>(row, first_k + k, depth - k));
      }
  });
}

void pack_right(const Matrix& b, bool transposed, int64_t first_k, int64_t depth, int64_t first_n, int64_t columns,
                void* packed) {
  const int64_t pairs = pairs_of(depth);
  auto panel = [&](int64_t n) {
    return (uint32_t*)packed + n / kTileColumns * kTileColumns * pairs + n % kTileColumns;
  };
  with_kind(b.kind, [&](auto kind) {
    constexpr Kind K = decltype(kind)::value;
    if (!transposed) {
      for (int64_t k = 0; k < 2 * pairs; k += 2) {
        const void* even = k < depth ? row_of<K>(b, first_k + k) : nullptr;
        const void* odd = k + 1 < depth ? row_of<K>(b, first_k + k + 1) : nullptr;
        sweep(columns, [&](int64_t n, int64_t some) {
          store_pairs(panel(n) + k / 2 * kTileColumns, even ? across<K>(even, odd, first_n + n, some) : i16{});
        });
      }
      return;
    }
    for (int64_t n = 0; n < columns; n += 16) {
      const int64_t wide = columns - n < 16 ? columns - n : 16;
      const void* row[16];
      for (int64_t i = 0; i < 16; ++i) row[i] = row_of<K>(b, first_n + n + (i < wide ? i : 0));
      for (int64_t k = 0; k < depth; k += kTogether) {
        f16 v[16];
        for (int64_t i = 0; i < 16; ++i) v[i] = (f16)along<K>(row[i], first_k + k, depth - k);
        transpose(v);
        for (int64_t i = 0; i < 16; ++i) store_pairs(panel(n) + (k / 2 + i) * kTileColumns, (i16)v[i]);
      }
    }
  });
}

template <int64_t ROWS>
constexpr Products products(const char* name, decltype(Products::multiply) multiply) {
  return {name, ROWS,      kTileColumns,    kPairDepth, 4 * ROWS * kRowStride,
          2,    kTogether, pack_left<ROWS>, pack_right, multiply};
}

}  // namespace
}  // namespace deepseek
