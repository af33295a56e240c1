// Sixteen floats at a time, the same bits on every instruction set: included by each of them, in its own unnamed
// namespace, so that no inline function compiled for one machine can be linked into the code for another.
//
// Arithmetic is written with the compiler's vectors; fused multiply-add is spelled out, because a plain machine has none
// and contraction is switched off (-ffp-contract=off), and so is, for AVX2, what the compiler would do lane by lane.
#pragma once
#include <type_traits>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace deepseek {
namespace {

// A call passes vectors wider than the machine's through memory.
#define INLINE inline __attribute__((always_inline))

typedef float f16 __attribute__((vector_size(64), aligned(64)));
typedef float f16u __attribute__((vector_size(64), aligned(4)));
typedef int32_t i16 __attribute__((vector_size(64), aligned(64)));

inline f16 load(const float* p) { return *reinterpret_cast<const f16u*>(p); }
inline void store(float* p, f16 v) { *reinterpret_cast<f16u*>(p) = v; }
inline f16 all(float x) { return f16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

#if defined(__AVX2__) && !defined(__AVX512F__)
#define BY_HALVES 1
// GCC 12 takes comparisons, choices and calls apart into single lanes where a vector is wider than the machine's.
typedef float f8 __attribute__((vector_size(32)));
union Halves {
  f16 whole;
  f8 half[2];
};
template <typename Work, typename... Vectors>
INLINE f16 by_halves(const Work& work, const Vectors&... v) {
  Halves out;
  out.half[0] = work(Halves{v}.half[0]...), out.half[1] = work(Halves{v}.half[1]...);
  return out.whole;
}
INLINE f8 larger(f8 a, f8 b) { return (f8)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE f8 fma(f8 a, f8 b, f8 c) { return (f8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#endif

INLINE f16 fma(f16 a, f16 b, f16 c) {
#if defined(__AVX512F__)
  return (f16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(BY_HALVES)
  return by_halves([](f8 a, f8 b, f8 c) { return fma(a, b, c); }, a, b, c);
#else
  for (int i = 0; i < 16; ++i) a[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return a;
#endif
}

// All bits where a > b, where a == b, elsewhere none.
INLINE i16 above(f16 a, f16 b) {
#if defined(BY_HALVES)
  return (i16)by_halves([](f8 a, f8 b) { return (f8)(a > b); }, a, b);
#else
  return a > b;
#endif
}
INLINE i16 equal(f16 a, f16 b) {
#if defined(BY_HALVES)
  return (i16)by_halves([](f8 a, f8 b) { return (f8)(a == b); }, a, b);
#else
  return a == b;
#endif
}
INLINE f16 choose(i16 where, f16 a, f16 b) {
#if defined(BY_HALVES)
  return (f16)(((i16)a & where) | ((i16)b & ~where));
#else
  return where ? a : b;
#endif
}

// Calls `work` with the constant that equals n, of 1 to N; for another n not at all.
template <int N, typename Work>
INLINE void with_constant(int64_t n, const Work& work) {
  if constexpr (N > 0) {
    if (n == N) return work(std::integral_constant<int, N>{});
    with_constant<N - 1>(n, work);
  }
}

inline i16 larger(i16 a, i16 b) { return a > b ? a : b; }
inline f16 larger(f16 a, f16 b) {
#if defined(__AVX512F__)
  return (f16)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(BY_HALVES)
  return by_halves([](f8 a, f8 b) { return larger(a, b); }, a, b);
#else
  return a > b ? a : b;
#endif
}
inline f16 absolute(f16 a) { return (f16)((i16)a & 0x7fffffff); }
inline i16 to_int(f16 a) { return __builtin_convertvector(a, i16); }
inline f16 to_float(i16 a) { return __builtin_convertvector(a, f16); }

// To the nearest integer, ties to even, |x| < 2^22.
template <typename V>
inline V nearest(V x) {
  return (x + 12582912.0f) - 12582912.0f;
}

template <typename V>
inline auto largest(V v) {
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) v[i] = v[i] > v[i + half] ? v[i] : v[i + half];
  return v[0];
}

#if defined(__AVX2__)
inline float largest(__m256 eight) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}
inline float largest(f16 v) {
  __m256 half[2];
  std::memcpy(half, &v, 64);
  return largest(_mm256_max_ps(half[0], half[1]));
}
#endif

// In a fixed tree: lanes 8 apart, 4 apart, 2, 1.
inline float total(f16 v) {
#if defined(__AVX2__)
  __m256 half[2];
  std::memcpy(half, &v, 64);
  const __m256 eight = _mm256_add_ps(half[0], half[1]);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) v[i] = v[i] + v[i + half];
  return v[0];
#endif
}

inline int32_t total(i16 v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32((__m512i)v);
#else
  int32_t sum = 0;
  for (int i = 0; i < 16; ++i) sum += v[i];
  return sum;
#endif
}

// The last `count` < 16 numbers, zeros after them.
inline f16 load_some(const float* p, int64_t count) {
  float tail[16] = {};
  std::memcpy(tail, p, sizeof(float) * count);
  return load(tail);
}

// Long sums are kept in as many registers as there are, so they are taken in parts of a register: all sixteen lanes, or
// one half after the other.
#if defined(BY_HALVES)
typedef f8 part;
INLINE part each(float x) { return part{x, x, x, x, x, x, x, x}; }
#else
typedef f16 part;
INLINE part each(float x) { return all(x); }
#endif
typedef decltype(part{} > part{}) ipart;
constexpr int kLanes = sizeof(part) / 4, kParts = 16 / kLanes;

INLINE part load_part(const float* p) {
  part v;
  std::memcpy(&v, p, sizeof(part));
  return v;
}
INLINE void store_part(float* p, part v) { std::memcpy(p, &v, sizeof(part)); }

// sum += a * b, fused. Spelled out, because GCC 12 copies every sum before and after its builtin, which halves the rate.
INLINE void add_product(part& sum, part a, part b) {
#if defined(__AVX2__)
  asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#else
  sum = fma(a, b, sum);
#endif
}

// e^x: x = n ln 2 + r, a polynomial of degree 7 in r, exponent bits added. Relative error below 2e-7; 0 below -87.
template <typename V>
INLINE V exponential_of(V x) {
  const V zero = {};
  x = x > 88.0f ? zero + 88.0f : x;
  auto live = x > -87.0f;
  x = x > -87.0f ? x : zero - 87.0f;
  V n = nearest(x * 1.44269504f);
  V r = fma(n, zero - 0.693145752f, x);
  r = fma(n, zero - 1.42860677e-6f, r);
  V p = zero + 1.98412698e-4f;
  p = fma(p, r, zero + 1.38888889e-3f);
  p = fma(p, r, zero + 8.33333333e-3f);
  p = fma(p, r, zero + 4.16666667e-2f);
  p = fma(p, r, zero + 1.66666667e-1f);
  p = fma(p, r, zero + 0.5f);
  p = fma(p, r, zero + 1.0f);
  p = fma(p, r, zero + 1.0f);
  auto bits = (__builtin_convertvector(n, decltype(live)) << 23) + (decltype(live))p;
  return (V)(bits & live);
}

INLINE f16 exponential(f16 x) {
#if defined(BY_HALVES)
  return by_halves([](f8 x) { return exponential_of(x); }, x);
#else
  return exponential_of(x);
#endif
}

INLINE f16 silu(f16 x) { return x / (1.0f + exponential(-x)); }

// Results of R panels from their sums, acc [tokens][R][16]: FP32 (4 bits) or int32 (8 bits).
template <int BITS, int R>
INLINE void put_panels(const float* acc, const uint8_t* w, const Panel& shape, const float* scale, int64_t tokens,
                       bool gated, float* out, int64_t ld) {
  for (int64_t t = 0; t < tokens; ++t) {
    f16 y[R];
    for (int r = 0; r < R; ++r) {
      f16 s = load(acc + (t * R + r) * 16);
      if (BITS == 8) s = to_float((i16)s);
      y[r] = s * (load((const float*)(w + r * shape.bytes)) * scale[t]);
    }
    if (gated)
      store(out + t * ld, silu(y[0]) * y[R - 1]);
    else
      for (int r = 0; r < R; ++r) store(out + t * ld + 16 * r, y[r]);
  }
}

INLINE part part_from_bf16(const uint16_t* p) {
#if defined(__AVX512F__)
  return (f16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(BY_HALVES)
  return (f8)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  i16 wide;
  for (int i = 0; i < 16; ++i) wide[i] = (int32_t)((uint32_t)p[i] << 16);
  return (f16)wide;
#endif
}
INLINE f16 from_bf16(const uint16_t* p) {
#if defined(BY_HALVES)
  Halves wide;
  wide.half[0] = part_from_bf16(p), wide.half[1] = part_from_bf16(p + 8);
  return wide.whole;
#else
  return part_from_bf16(p);
#endif
}

void quantize(const float* x, int64_t columns, int8_t* q, int32_t* surplus, float* scale) {
  i16 top = {};  // magnitudes in the order of their bits, which is the same, and in which NaN is the largest
  int64_t whole = columns / 16 * 16;
  for (int64_t k = 0; k < whole; k += 16) top = larger(top, (i16)absolute(load(x + k)));
  if (whole < columns) top = larger(top, (i16)absolute(load_some(x + whole, columns - whole)));
  int32_t bits = largest(top);
  float peak;
  std::memcpy(&peak, &bits, 4);
  if (!(peak < __builtin_inff())) {  // a number that is not finite makes every result of its row NaN
    std::memset(q, 0, blocks_of(columns) * kBlock);
    std::memset(surplus, 0, sizeof(int32_t) * blocks_of(columns));
    *scale = __builtin_nanf("");
    return;
  }
  *scale = peak / 127.0f;
  float inverse = peak > 0.0f ? 127.0f / peak : 0.0f;
  if (!(inverse < 3e38f)) inverse = 0.0f;  // a row of denormals is a row of zeros
  auto sixteen = [&](int64_t k, f16 v) __attribute__((always_inline)) {
    i16 wide = to_int(nearest(v * inverse));
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i*)(q + k), _mm512_cvtepi32_epi8((__m512i)wide));
#else
    for (int i = 0; i < 16; ++i) q[k + i] = (int8_t)wide[i];
#endif
    return wide;
  };
  int64_t b = 0, k = 0;
  for (; k + kBlock <= columns; ++b, k += kBlock)
    surplus[b] = -128 * total((sixteen(k, load(x + k)) + sixteen(k + 16, load(x + k + 16))) +
                              (sixteen(k + 32, load(x + k + 32)) + sixteen(k + 48, load(x + k + 48))));
  if (k < columns) {
    i16 sum = {};
    for (int64_t end = k + kBlock; k < end; k += 16)
      sum += sixteen(k, k < columns ? load_some(x + k, columns - k < 16 ? columns - k : 16) : all(0.0f));
    surplus[b] = -128 * total(sum);
  }
}

// Midpoints of the NF4 codebook in FP32, as bitsandbytes compares with them.
constexpr float kCodebook[16] = {-1.0f,
                                 -0.6961928009986877f,
                                 -0.5250730514526367f,
                                 -0.39491748809814453f,
                                 -0.28444138169288635f,
                                 -0.18477343022823334f,
                                 -0.09105003625154495f,
                                 0.0f,
                                 0.07958029955625534f,
                                 0.16093020141124725f,
                                 0.24611230194568634f,
                                 0.33791524171829224f,
                                 0.44070982933044434f,
                                 0.5626170039176941f,
                                 0.7229568362236023f,
                                 1.0f};

// Codes of one block of 64 into code, levels into level; returns the scale that fits best.
inline float nf4_block(const float* w, uint8_t* code, float* level) {
  f16 v[4], top = all(0.0f);
  for (int i = 0; i < 4; ++i) v[i] = load(w + 16 * i), top = larger(top, absolute(v[i]));
  float peak = largest(top), inverse = 1.0f / (peak > 1e-38f ? peak : 1e-38f);
  f16 product = all(0.0f), square = all(0.0f);
  for (int i = 0; i < 4; ++i) {
    f16 q = v[i] * inverse, l = all((float)kLevels[0]);
    i16 c = {};
    for (int m = 0; m < 15; ++m) {
      i16 past = above(q, all((kCodebook[m] + kCodebook[m + 1]) / 2.0f));
      c -= past;
      l = l + (f16)((i16)all((float)(kLevels[m + 1] - kLevels[m])) & past);
    }
    for (int n = 0; n < 16; ++n) code[16 * i + n] = (uint8_t)c[n];
    store(level + 16 * i, l);
    product = fma(v[i], l, product), square = fma(l, l, square);
  }
  float norm = total(square);
  return total(product) / (norm > 1.0f ? norm : 1.0f);
}

void quantize_weights(const float* w, int64_t columns, int bits, int64_t r, uint8_t* panel, float* room,
                      double* squares) {
  const Panel shape(columns, bits);
  const int64_t padded = shape.blocks * kBlock;
  float* x = room;  // the row, with zeros after it
  float* level = room + padded;
  float* fits = room + 2 * padded;
  std::memcpy(x, w, sizeof(float) * columns);
  std::memset(x + columns, 0, sizeof(float) * (padded - columns));
  uint8_t* to = panel + shape.codes + 4 * r;
  float step;
  f16 error = all(0.0f), weight = all(0.0f);
  for (int64_t k = 0; k < padded; k += 16) weight = fma(load(x + k), load(x + k), weight);
  if (bits == 8) {
    f16 top = all(0.0f);
    for (int64_t k = 0; k < padded; k += 16) top = larger(top, absolute(load(x + k)));
    step = largest(top) / 127.0f;
    for (int64_t k = 0; k < padded; k += 16) {
      f16 q = step > 0.0f ? nearest(load(x + k) / step) : all(0.0f), e = load(x + k) - q * step;
      error = fma(e, e, error);
      for (int n = 0; n < 16; ++n) to[64 * ((k + n) / 4) + n % 4] = (uint8_t)(int8_t)q[n];
    }
  } else {
    uint8_t code[kBlock];
    float best = 0.0f;
    for (int64_t b = 0; b < shape.blocks; ++b) {
      float fit = nf4_block(x + kBlock * b, code, level + kBlock * b);
      best = best > fit ? best : fit;
      for (int64_t g = 0; g < 8; ++g)
        for (int64_t j = 0; j < 4; ++j)
          to[512 * b + 64 * g + j] = (uint8_t)(code[8 * g + j] | code[8 * g + 4 + j] << 4);
      fits[b] = fit;
    }
    step = best / 255.0f;
    for (int64_t b = 0; b < shape.blocks; ++b) {
      f16 scale = nearest(all(fits[b] / (step > 1.17549435e-38f ? step : 1.17549435e-38f)));
      panel[64 + 16 * b + r] = (uint8_t)scale[0];
      for (int64_t k = kBlock * b; k < kBlock * (b + 1); k += 16) {
        f16 e = load(x + k) - load(level + k) * (scale * step);
        error = fma(e, e, error);
      }
    }
  }
  std::memcpy(panel + 4 * r, &step, 4);
  squares[0] += total(error), squares[1] += total(weight);
}

INLINE part widened(const uint16_t* p) { return part_from_bf16(p); }
INLINE part widened(const float* p) { return load_part(p); }
INLINE f16 widened_whole(const uint16_t* p) { return from_bf16(p); }
INLINE f16 widened_whole(const float* p) { return load(p); }

// A row of weights times T rows of activations: y[16 t]. Weights are read in their order, which memory is fastest at.
template <int T, typename W>
__attribute__((noinline))  // inlined, its sums land in memory
void dense_row(const W* w, int64_t columns, const float* const* x, float* y) {
  constexpr int U = 4;  // blocks of 16 columns, each with sums of its own
  const int64_t whole = columns / 16 * 16;
  alignas(64) float sums[T][U][16];
  for (int lane = 0; lane < 16; lane += kLanes) {
    part sum[T][U];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) sum[t][u] = part{};
    auto block = [&](int64_t k, int u) __attribute__((always_inline)) {
      const part weight = widened(w + k + lane);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) add_product(sum[t][u], weight, load_part(x[t] + k + lane));
    };
    int64_t k = 0;
    for (; k + 16 * U <= whole; k += 16 * U)
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) block(k + 16 * u, u);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u)
      if (k + 16 * u < whole) block(k + 16 * u, u);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) store_part(sums[t][u] + lane, sum[t][u]);
  }
  for (int t = 0; t < T; ++t) {
    f16 sum = (load(sums[t][0]) + load(sums[t][1])) + (load(sums[t][2]) + load(sums[t][3]));
    if (whole < columns) {
      W tail[16] = {};
      std::memcpy(tail, w + whole, sizeof(W) * (columns - whole));
      sum = fma(widened_whole(tail), load_some(x[t] + whole, columns - whole), sum);
    }
    y[16 * t] = total(sum);
  }
}

template <typename W>
void dense_rows(const W* w, const W* up, int64_t rows, const Rows& x, const int32_t* row, int64_t tokens, float* out,
                int64_t ld) {
  for (int64_t r = 0; r < rows; r += 16) {  // sixteen rows stay in the cache while the tokens pass
    const int64_t some = rows - r < 16 ? rows - r : 16;
    int64_t t = 0;
    auto tile = [&](auto n) {
      constexpr int T = decltype(n)::value;
      for (; t + T <= tokens; t += T) {
        const float* at[T];
        for (int i = 0; i < T; ++i) at[i] = x.x + (row ? row[t + i] : t + i) * x.columns;
        f16 y[T] = {}, u[T] = {};
        for (int64_t i = 0; i < some; ++i) {
          dense_row<T>(w + (r + i) * x.columns, x.columns, at, (float*)y + i);
          if (up) dense_row<T>(up + (r + i) * x.columns, x.columns, at, (float*)u + i);
        }
        for (int i = 0; i < T; ++i) {
          if (up) y[i] = silu(y[i]) * u[i];
          std::memcpy(out + (t + i) * ld + r, &y[i], sizeof(float) * some);
        }
      }
    };
    tile(std::integral_constant<int, 4 / kParts>{});
    tile(std::integral_constant<int, 1>{});
  }
}

void rms_norm(const float* x, const float* w, int64_t width, float eps, float* out) {
  f16 squares = all(0.0f);
  int64_t whole = width / 16 * 16;
  for (int64_t k = 0; k < whole; k += 16) squares = fma(load(x + k), load(x + k), squares);
  if (whole < width) {
    f16 tail = load_some(x + whole, width - whole);
    squares = fma(tail, tail, squares);
  }
  float r = 1.0f / __builtin_sqrtf(total(squares) / (float)width + eps);
  for (int64_t k = 0; k < whole; k += 16) store(out + k, load(x + k) * r * load(w + k));
  for (int64_t k = whole; k < width; ++k) out[k] = x[k] * r * w[k];
}

void weighted_sum(const float* const* y, const float* weight, int64_t count, const float* add, int64_t width,
                  float* out) {
  constexpr int N = 4 * kParts;  // sums at a time, which do not wait for each other
  int64_t k = 0;
  for (; k + N * kLanes <= width; k += N * kLanes) {
    part acc[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) acc[n] = add ? load_part(add + k + n * kLanes) : part{};
    for (int64_t i = 0; i < count; ++i) {
      const part w = each(weight[i]);
      const float* from = y[i] + k;
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) add_product(acc[n], w, load_part(from + n * kLanes));
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) store_part(out + k + n * kLanes, acc[n]);
  }
  const int64_t whole = width / 16 * 16;
  for (; k < width; k += 16) {
    int64_t some = k < whole ? 16 : width - k;
    f16 acc = add ? (some == 16 ? load(add + k) : load_some(add + k, some)) : all(0.0f);
    for (int64_t i = 0; i < count; ++i)
      acc = fma(all(weight[i]), some == 16 ? load(y[i] + k) : load_some(y[i] + k, some), acc);
    if (some == 16)
      store(out + k, acc);
    else
      for (int64_t i = 0; i < some; ++i) out[k + i] = acc[i];
  }
}

}  // namespace
}  // namespace deepseek
