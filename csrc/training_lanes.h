// The kernels of training.h in sixteen-float vectors: included once for each instruction set.
#pragma once
#pragma GCC diagnostic ignored "-Wunused-function"
#include "moments_lanes.h"
#include "training_access.h"
#include "two_bits_lanes.h"

namespace deepseek {
namespace {

#if defined(__AVX512F__)
constexpr int kTileRows = 14, kVectors = 2;  // 28 sums, 2 columns and a broadcast: 31 of 32 registers
constexpr int kStep = 16;                    // of a transposed strip
#else
constexpr int kTileRows = 6, kVectors = 1;
constexpr int kStep = 8;
#endif
constexpr int kTileColumns = 16 * kVectors;
constexpr int kAheadRows = 16;                  // of a panel, prefetched into the first cache
constexpr int64_t kRowStride = kDepth + 16;     // of a strip that is not transposed: an odd number of cache lines
constexpr int64_t kStripFloats = kTileRows * kRowStride > kDepth* kStep ? kTileRows * kRowStride : kDepth * kStep + 16;

// ---- products -----------------------------------------------------------------------------------------------------

void pack_left(const Matrix& a, bool transposed, int64_t first_row, int64_t rows, int64_t first_k, int64_t depth,
               void* packed) {
  float* out = (float*)packed;
  with_kind(a.kind, [&](auto kind) {
    constexpr Kind K = decltype(kind)::value;
    if (transposed)
      for (int64_t k = 0; k < depth; ++k) {
        const void* row = row_of<K>(a, first_k + k);
        float* to = out + k * kStep;
        for (int64_t r = 0; r < rows; r += kTileRows, to += kStripFloats)
          store(to, get<K>(row, first_row + r, rows - r));
      }
    else
      for (int64_t r = 0; r < rows; ++r) {
        const void* row = row_of<K>(a, first_row + r);
        float* to = out + r / kTileRows * kStripFloats + r % kTileRows * kRowStride;
        sweep(depth, [&](int64_t k, int64_t n) { store(to + k, get<K>(row, first_k + k, n)); });
      }
  });
}

void pack_right(const Matrix& b, bool transposed, int64_t first_k, int64_t depth, int64_t first_n, int64_t columns,
                void* packed) {
  float* out = (float*)packed;
  with_kind(b.kind, [&](auto kind) {
    constexpr Kind K = decltype(kind)::value;
    auto panel = [&](int64_t n) { return out + n / kTileColumns * kTileColumns * depth + n % kTileColumns; };
    if (!transposed) {
      for (int64_t k = 0; k < depth; ++k) {
        const void* row = row_of<K>(b, first_k + k);
        sweep(columns,
              [&](int64_t n, int64_t some) { store(panel(n) + k * kTileColumns, get<K>(row, first_n + n, some)); });
      }
      return;
    }
    for (int64_t n = 0; n < columns; n += 16) {
      int64_t wide = columns - n < 16 ? columns - n : 16;
      const void* row[16];
      for (int64_t i = 0; i < 16; ++i) row[i] = row_of<K>(b, first_n + n + (i < wide ? i : 0));
      sweep(depth, [&](int64_t k, int64_t some) {
        f16 v[16];
        for (int i = 0; i < 16; ++i) v[i] = get<K>(row[i], first_k + k, some);
        transpose(v);
        for (int64_t i = 0; i < some; ++i) store(panel(n) + (k + i) * kTileColumns, v[i]);
      });
    }
  });
}

// tile [R][kTileColumns] = a strip times a panel
template <int R, bool TRANSPOSED>
__attribute__((noinline))  // inlined, its sums land in memory
void tile_product(const float* a, const float* b, int64_t depth, float* tile) {
#if defined(__AVX512F__)
  __m512 acc[R][kVectors];
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < depth; ++k) {
    const __m512 v0 = _mm512_loadu_ps(b + k * kTileColumns), v1 = _mm512_loadu_ps(b + k * kTileColumns + 16);
    _mm_prefetch((const char*)(b + (k + kAheadRows) * kTileColumns), _MM_HINT_T0);
    _mm_prefetch((const char*)(b + (k + kAheadRows) * kTileColumns + 16), _MM_HINT_T0);
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
      const __m512 x = _mm512_set1_ps(TRANSPOSED ? a[kStep * k + r] : a[kRowStride * r + k]);
      // spelled out, because GCC 12 copies every sum before and after its builtin
      asm("vfmadd231ps %2, %1, %0" : "+v"(acc[r][0]) : "v"(x), "v"(v0));
      asm("vfmadd231ps %2, %1, %0" : "+v"(acc[r][1]) : "v"(x), "v"(v1));
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r) {
    _mm512_storeu_ps(tile + r * kTileColumns, acc[r][0]);
    _mm512_storeu_ps(tile + r * kTileColumns + 16, acc[r][1]);
  }
#elif defined(__FMA__)
  __m256 acc[R][2];  // 12 sums, 2 halves of a row and a broadcast: 15 of 16 registers
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_ps();
  for (int64_t k = 0; k < depth; ++k) {
    const __m256 v0 = _mm256_loadu_ps(b + k * kTileColumns), v1 = _mm256_loadu_ps(b + k * kTileColumns + 8);
    _mm_prefetch((const char*)(b + (k + kAheadRows) * kTileColumns), _MM_HINT_T0);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const __m256 x = _mm256_set1_ps(TRANSPOSED ? a[kStep * k + r] : a[kRowStride * r + k]);
      asm("vfmadd231ps %2, %1, %0" : "+x"(acc[r][0]) : "x"(x), "x"(v0));
      asm("vfmadd231ps %2, %1, %0" : "+x"(acc[r][1]) : "x"(x), "x"(v1));
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    _mm256_storeu_ps(tile + r * kTileColumns, acc[r][0]);
    _mm256_storeu_ps(tile + r * kTileColumns + 8, acc[r][1]);
  }
#else
  f16 acc[R];
  for (int r = 0; r < R; ++r) acc[r] = all(0.0f);
  for (int64_t k = 0; k < depth; ++k) {
    f16 v = load(b + k * kTileColumns);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) acc[r] = fma(all(TRANSPOSED ? a[kStep * k + r] : a[kRowStride * r + k]), v, acc[r]);
  }
  for (int r = 0; r < R; ++r) store(tile + r * kTileColumns, acc[r]);
#endif
}

template <bool TRANSPOSED>
inline void some_rows(int64_t rows, const float* a, const float* b, int64_t depth, float* tile) {
  with_constant<kTileRows / 2>((rows + 1) / 2,
                               [&](auto n) { tile_product<2 * decltype(n)::value, TRANSPOSED>(a, b, depth, tile); });
}

void multiply(const void* left, bool transposed, int64_t rows, const void* right, int64_t panel, int64_t depth,
              int64_t columns, float* out, int64_t ld, bool add) {
  const float *a = (const float*)left, *b = (const float*)right;
  alignas(64) float tile[kTileRows * kTileColumns];
  for (int64_t n = 0; n < columns; n += kTileColumns, b += panel / 4) {
    transposed ? some_rows<true>(rows, a, b, depth, tile) : some_rows<false>(rows, a, b, depth, tile);
    put_tile(tile, kTileColumns, rows, columns - n < kTileColumns ? columns - n : kTileColumns, out + n, ld, add);
  }
}

// ---- passes -------------------------------------------------------------------------------------------------------

void scaled(const float* x, int64_t count, float scale, void* out, Kind kind) {
  with_kind(kind, [&](auto k) {
    sweep(count, [&](int64_t i, int64_t n) { put<decltype(k)::value>(out, i, get<kFloat>(x, i, n) * scale, n); });
  });
}

void sum_rows(const float* const* rows, int64_t count, int64_t width, void* out, Kind kind) {
  with_kind(kind, [&](auto k) {
    sweep(width, [&](int64_t i, int64_t n) {
      f16 sum = all(0.0f);
      for (int64_t r = 0; r < count; ++r) sum = sum + get<kFloat>(rows[r], i, n);
      put<decltype(k)::value>(out, i, sum, n);
    });
  });
}

void gated(const void* gate, const void* up, Kind kind, float weight, int64_t width, void* h, Kind h_kind) {
  with_kind(kind, [&](auto k) {
    with_kind(h_kind, [&](auto to) {
      constexpr Kind K = decltype(k)::value;
      sweep(width, [&](int64_t i, int64_t n) {
        put<decltype(to)::value>(h, i, silu(get<K>(gate, i, n)) * get<K>(up, i, n) * weight, n);
      });
    });
  });
}

float gated_back(const void* dh, const void* gate, const void* up, Kind kind, Kind dh_kind, float weight, int64_t width,
                 void* d_gate, void* d_up, Kind out_kind, void* hw) {
  f16 dot = all(0.0f);
  with_kind(kind, [&](auto k) {
    with_kind(dh_kind, [&](auto k_dh) {
      with_kind(out_kind, [&](auto to) {
        constexpr Kind K = decltype(k)::value, OUT = decltype(to)::value;
        sweep(width, [&](int64_t i, int64_t n) {
          f16 g = get<K>(gate, i, n), u = get<K>(up, i, n), d = get<decltype(k_dh)::value>(dh, i, n);
          f16 s = 1.0f / (1.0f + exponential(-g));
          f16 act = g * s, h = act * u;
          if (hw) {
            dot = fma(d, h, dot);  // lanes past the end hold zeros
            put<OUT>(hw, i, h * weight, n);
          }
          d = d * weight;
          put<OUT>(d_up, i, d * act, n);
          put<OUT>(d_gate, i, d * u * (s * (1.0f + g * (1.0f - s))), n);
        });
      });
    });
  });
  return total(dot);
}

inline float logarithm(float x) { return __builtin_logf(x); }

float cross_entropy(float* logits, int64_t width, int64_t label, float scale, bool gradient, Kind kind) {
  f16 top = all(-__builtin_inff());
  float best;
  int64_t whole = width / 16 * 16;
  for (int64_t i = 0; i < whole; i += 16) top = larger(top, load(logits + i));
  best = largest(top);
  for (int64_t i = whole; i < width; ++i) best = logits[i] > best ? logits[i] : best;
  float picked = logits[label];
  f16 sum = all(0.0f);
  sweep(width, [&](int64_t i, int64_t n) {
    f16 e = exponential(get<kFloat>(logits, i, n) - best);
    if (gradient) put<kFloat>(logits, i, e, n);
    sum = sum + first(e, n);
  });
  float norm = total(sum);
  if (gradient) {
    const float by = scale / norm, at_label = logits[label] * by - scale;
    with_kind(kind, [&](auto k) {
      constexpr Kind K = decltype(k)::value;
      sweep(width, [&](int64_t i, int64_t n) { put<K>(logits, i, get<kFloat>(logits, i, n) * by, n); });
      put<K>(logits, label, all(at_label), 1);
    });
  }
  return logarithm(norm) + best - picked;
}

void softmax(float* scores, float scale, int64_t live, int64_t width, void* saved, Kind kind) {
  f16 top = all(-__builtin_inff());
  sweep(live, [&](int64_t i, int64_t n) {
    f16 v = get<kFloat>(scores, i, n);
    if (n < 16)
      for (int64_t j = n; j < 16; ++j) v[j] = scores[i];
    top = larger(top, v);
  });
  float best = largest(top);
  f16 sum = all(0.0f);
  sweep(live, [&](int64_t i, int64_t n) {
    f16 e = exponential((get<kFloat>(scores, i, n) - best) * scale);
    put<kFloat>(scores, i, e, n);
    sum = sum + first(e, n);
  });
  float by = 1.0f / total(sum);
  with_kind(kind, [&](auto k) {
    constexpr Kind K = decltype(k)::value;
    sweep(width, [&](int64_t i, int64_t n) {
      int64_t some = live - i < n ? live - i : n;
      f16 p = some > 0 ? first(get<kFloat>(scores, i, some) * by, some) : all(0.0f);
      if (K == kBf16) p = rounded(p);
      put<kFloat>(scores, i, p, n);
      put<K>(saved, i, p, n);
    });
  });
}

void softmax_back(const void* p, Kind kind, float* dp, int64_t live, int64_t width) {
  with_kind(kind, [&](auto k) {
    constexpr Kind K = decltype(k)::value;
    f16 dot = all(0.0f);
    sweep(live, [&](int64_t i, int64_t n) { dot = fma(get<K>(p, i, n), get<kFloat>(dp, i, n), dot); });
    float mean = total(dot);
    sweep(width, [&](int64_t i, int64_t n) {  // probabilities past `live` are zeros
      put<kFloat>(dp, i, i < live ? get<K>(p, i, n) * (get<kFloat>(dp, i, n) - mean) : all(0.0f), n);
    });
  });
}

float norm(const void* x, Kind kind, const float* w, int64_t width, float eps, void* y) {
  float r = 0.0f;
  with_kind(kind, [&](auto k) {
    constexpr Kind K = decltype(k)::value;
    f16 squares = all(0.0f);
    sweep(width, [&](int64_t i, int64_t n) {
      f16 v = get<K>(x, i, n);
      squares = fma(v, v, squares);
    });
    r = 1.0f / __builtin_sqrtf(total(squares) / (float)width + eps);
    sweep(width, [&](int64_t i, int64_t n) {
      f16 v = get<K>(x, i, n) * r, by = get<kFloat>(w, i, n);
      if (K == kBf16) v = rounded(v), by = rounded(by);
      put<K>(y, i, v * by, n);
    });
  });
  return r;
}

void norm_back(const void* x, const void* dy, Kind kind, const float* w, float r, int64_t width, void* dx, float* dw) {
  with_kind(kind, [&](auto k) {
    constexpr Kind K = decltype(k)::value;
    f16 dot = all(0.0f);
    sweep(width, [&](int64_t i, int64_t n) {
      f16 t = get<K>(dy, i, n) * (get<K>(x, i, n) * r);
      put<kFloat>(dw, i, get<kFloat>(dw, i, n) + t, n);
      dot = fma(t, get<kFloat>(w, i, n), dot);
    });
    float mean = total(dot) / (float)width;
    sweep(width, [&](int64_t i, int64_t n) {
      f16 v = get<K>(dy, i, n) * get<kFloat>(w, i, n) - get<K>(x, i, n) * r * mean;
      put<K>(dx, i, v * r, n);
    });
  });
}

void rotate(const void* x, Kind kind, const float* cos, const float* sin, int64_t pairs, bool interleaved, bool back,
            void* out) {
  static const i16 even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}, odd = even + 1;
  static const i16 low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}, high = low + 8;
  with_kind(kind, [&](auto k) {
    constexpr Kind K = decltype(k)::value;
    sweep(pairs, [&](int64_t i, int64_t n) {
      const f16 c = get<kFloat>(cos, i, n), s = get<kFloat>(sin, i, n);
      const int64_t first = n < 8 ? 2 * n : 16, second = 2 * n - first;  // numbers of n interleaved pairs
      f16 a, b;
      if (interleaved && !back) {
        const f16 v = get<K>(x, 2 * i, first), w = second ? get<K>(x, 2 * i + 16, second) : f16{};
        a = __builtin_shuffle(v, w, even), b = __builtin_shuffle(v, w, odd);
      } else {
        a = get<K>(x, i, n), b = get<K>(x, pairs + i, n);
      }
      const f16 to_a = back ? a * c + b * s : a * c - b * s, to_b = back ? b * c - a * s : b * c + a * s;
      if (interleaved && back) {
        put<K>(out, 2 * i, __builtin_shuffle(to_a, to_b, low), first);
        if (second) put<K>(out, 2 * i + 16, __builtin_shuffle(to_a, to_b, high), second);
      } else {
        put<K>(out, i, to_a, n);
        put<K>(out, pairs + i, to_b, n);
      }
    });
  });
}

const TrainingKernels training = {
    {"fp32", kTileRows, kTileColumns, kDepth, 4 * kStripFloats, 4, 1, pack_left, pack_right, multiply},
    scaled,
    sum_rows,
    gated,
    gated_back,
    cross_entropy,
    softmax,
    softmax_back,
    norm,
    norm_back,
    rotate,
    adamw8_block<float>,
    adamw8_block<uint16_t>,
    moved_block,
    momentum8_block,
    two_bits_row,
    pack_two_bits,
    of_two_bits_row};

}  // namespace
}  // namespace deepseek
