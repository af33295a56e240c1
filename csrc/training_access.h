// How the kernels of training.h read and write rows of either kind, sixteen numbers at a time.
#pragma once
#pragma GCC diagnostic ignored "-Wunused-function"
#include "lanes.h"
#include "training.h"

namespace deepseek {
namespace {

// To BF16: nearest, ties to even; NaN stays NaN.
INLINE f16 rounded(f16 v) {
  i16 u = (i16)v;
  i16 nan = (0x7f800000 - (u & 0x7fffffff)) >> 31;
  i16 r = ((u + 0x7fff + ((u >> 16) & 1)) & ~nan) | ((u | 0x400000) & nan);
  return (f16)(r & (int32_t)0xffff0000);
}

template <Kind K>
INLINE f16 get(const void* p, int64_t i, int64_t count = 16) {
#if defined(__AVX512F__)
  if (count < 16) {
    __mmask16 some = (__mmask16)((1u << count) - 1);
    if (K == kBf16)
      return (f16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, (const uint16_t*)p + i)), 16);
    f16 v = (f16)_mm512_maskz_loadu_ps(some, (const float*)p + i);
    return K == kRounded ? rounded(v) : v;
  }
#endif
  if (K == kBf16) {
    if (count >= 16) return from_bf16((const uint16_t*)p + i);
    uint16_t tail[16] = {};
    std::memcpy(tail, (const uint16_t*)p + i, 2 * count);
    return from_bf16(tail);
  }
  f16 v = count >= 16 ? load((const float*)p + i) : load_some((const float*)p + i, count);
  return K == kRounded ? rounded(v) : v;
}

template <Kind K>
INLINE void put(void* p, int64_t i, f16 v, int64_t count = 16) {
  if (K == kBf16) {
    i16 u = (i16)rounded(v) >> 16;
    uint16_t some[16];
    uint16_t* to = count >= 16 ? (uint16_t*)p + i : some;
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)to, _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)u));
#else
    for (int j = 0; j < 16; ++j) to[j] = (uint16_t)u[j];
#endif
    if (count < 16) std::memcpy((uint16_t*)p + i, some, 2 * count);
  } else if (count >= 16) {
    store((float*)p + i, v);
  } else {
    std::memcpy((float*)p + i, &v, 4 * count);
  }
}

template <typename Work>
inline auto with_kind(Kind kind, const Work& work) {
  switch (kind) {
    case kBf16:
      return work(std::integral_constant<Kind, kBf16>{});
    case kRounded:
      return work(std::integral_constant<Kind, kRounded>{});
    default:
      return work(std::integral_constant<Kind, kFloat>{});
  }
}

template <typename Work>
inline void sweep(int64_t count, const Work& work) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) work(i, 16);
  if (i < count) work(i, count - i);
}

// The first `count` lanes of v, zeros elsewhere.
INLINE f16 first(f16 v, int64_t count) {
  if (count >= 16) return v;
  float some[16] = {};
  std::memcpy(some, &v, 4 * count);
  return load(some);
}

template <Kind K>
inline const void* row_of(const Matrix& m, int64_t r) {
  return (const char*)m.data + (m.index ? m.index[r] : r) * m.stride * bytes_of(K);
}

// A tile of sums, `tile_ld` numbers a row, to where they belong.
inline void put_tile(const float* tile, int64_t tile_ld, int64_t rows, int64_t columns, float* out, int64_t ld,
                     bool add) {
  for (int64_t r = 0; r < rows; ++r) {
    float* to = out + r * ld;
    const float* from = tile + r * tile_ld;
    sweep(columns, [&](int64_t c, int64_t some) {
      f16 v = load(from + c);
      put<kFloat>(to, c, add ? get<kFloat>(to, c, some) + v : v, some);
    });
  }
}

// Sixteen rows of sixteen numbers of 32 bits, in place.
inline void transpose(f16* v) {
  static const i16 low[4] = {{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23},
                             {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27},
                             {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29},
                             {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30}};
#pragma GCC unroll 4
  for (int s = 0; s < 4; ++s) {
    const int apart = 8 >> s;
    const i16 high = low[s] + apart;
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      if (!(i & apart)) {
        f16 a = v[i], b = v[i + apart];
        v[i] = __builtin_shuffle(a, b, low[s]), v[i + apart] = __builtin_shuffle(a, b, high);
      }
  }
}

}  // namespace
}  // namespace deepseek
