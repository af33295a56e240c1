// AVX2 with FMA. There is no product of bytes that cannot overflow 16 bits here, except |weight| times the activation
// with the weight's sign: 2 * 127 * 127 fits. So the code is looked up twice, level and magnitude.
#include "attention_lanes.h"

#if defined(__AVX2__) && defined(__FMA__)
namespace deepseek {
namespace {

constexpr int kTile = 3;  // tokens at a time: 2 halves x 3 tokens of sums and their operands fit 16 registers

inline __m256i table_of(bool magnitude) {
  alignas(16) int8_t bytes[16];
  for (int i = 0; i < 16; ++i) bytes[i] = (int8_t)(magnitude && kLevels[i] < 0 ? -kLevels[i] : kLevels[i]);
  return _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)bytes));
}

inline __m256i four(const int8_t* q) {
  int32_t v;
  std::memcpy(&v, q, 4);
  return _mm256_set1_epi32(v);
}

inline __m256i add_product(__m256i sum, __m256i level, __m256i magnitude, __m256i a) {
  __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(a, level));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// One panel, T tokens: y[t] = 16 results.
template <int BITS, int T>
inline void panel_product(const uint8_t* panel, const Panel& shape, const int8_t* const* q, const float* scale,
                          f16* y) {
  const uint8_t* code = panel + shape.codes;
  const __m256i levels = table_of(false), magnitudes = table_of(true), low = _mm256_set1_epi8(15);
  __m256i sum[T][2];
  __m256 acc[T][2];
  for (int t = 0; t < T; ++t)
    for (int h = 0; h < 2; ++h) acc[t][h] = _mm256_setzero_ps(), sum[t][h] = _mm256_setzero_si256();
  for (int64_t b = 0; b < shape.blocks; ++b) {
    for (int g = 0; g < 16; ++g)
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        __m256i level, magnitude;
        if (BITS == 4) {
          __m256i both = _mm256_loadu_si256((const __m256i*)(code + 64 * (g / 2) + 32 * h));
          __m256i index = _mm256_and_si256(g % 2 ? _mm256_srli_epi16(both, 4) : both, low);
          level = _mm256_shuffle_epi8(levels, index), magnitude = _mm256_shuffle_epi8(magnitudes, index);
        } else {
          level = _mm256_loadu_si256((const __m256i*)(code + 64 * g + 32 * h));
          magnitude = _mm256_abs_epi8(level);
        }
#pragma GCC unroll 3
        for (int t = 0; t < T; ++t)
          sum[t][h] = add_product(sum[t][h], level, magnitude, four(q[t] + kBlock * b + 4 * g));
      }
    code += BITS == 4 ? 512 : 1024;
    if (BITS == 4)
      for (int h = 0; h < 2; ++h) {
        __m256 s =
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(panel + 64 + 16 * b + 8 * h))));
        for (int t = 0; t < T; ++t) {
          acc[t][h] = _mm256_fmadd_ps(s, _mm256_cvtepi32_ps(sum[t][h]), acc[t][h]);
          sum[t][h] = _mm256_setzero_si256();
        }
      }
  }
  for (int t = 0; t < T; ++t)
    for (int h = 0; h < 2; ++h) {
      __m256 step = _mm256_mul_ps(_mm256_loadu_ps((const float*)panel + 8 * h), _mm256_set1_ps(scale[t]));
      __m256 v = _mm256_mul_ps(BITS == 4 ? acc[t][h] : _mm256_cvtepi32_ps(sum[t][h]), step);
      std::memcpy((char*)&y[t] + 32 * h, &v, 32);
    }
}

template <int BITS, int T>
void some_tokens(const uint8_t* w, int64_t count, bool gated, const Rows& x, const int32_t* row, int64_t t, float* out,
                 int64_t ld) {
  const Panel shape(x.blocks * kBlock, BITS);
  const int8_t* q[T];
  float scale[T];
  for (int i = 0; i < T; ++i) {
    int64_t r = row ? row[t + i] : t + i;
    q[i] = x.q + r * pitch_of(x.blocks), scale[i] = x.scale[r];
  }
  f16 y[T], up[T];
  for (int64_t p = 0; p < count; p += gated ? 2 : 1) {
    panel_product<BITS, T>(w + p * shape.bytes, shape, q, scale, y);
    if (gated) panel_product<BITS, T>(w + (p + 1) * shape.bytes, shape, q, scale, up);
    for (int i = 0; i < T; ++i) store(out + (t + i) * ld + (gated ? 8 : 16) * p, gated ? silu(y[i]) * up[i] : y[i]);
  }
}

template <int BITS>
void any_panels(const uint8_t* w, int64_t count, bool gated, const Rows& x, const int32_t* row, int64_t tokens,
                float* out, int64_t ld) {
  const Panel shape(x.blocks * kBlock, BITS);
  for (int64_t p = 0; p < count; p += 2) {  // a pair of panels stays in the cache while the tokens pass
    int64_t n = count - p < 2 ? count - p : 2, t = 0;
    const uint8_t* at = w + p * shape.bytes;
    float* to = out + (gated ? 8 : 16) * p;
    for (; t + kTile <= tokens; t += kTile) some_tokens<BITS, kTile>(at, n, gated, x, row, t, to, ld);
    for (; t < tokens; ++t) some_tokens<BITS, 1>(at, n, gated, x, row, t, to, ld);
  }
}

void panels(const uint8_t* w, int64_t count, int bits, bool gated, const Rows& x, const int32_t* row, int64_t tokens,
            float* out, int64_t ld) {
  (bits == 4 ? any_panels<4> : any_panels<8>)(w, count, gated, x, row, tokens, out, ld);
}

const Kernels table = {
    "avx2", quantize_weights, quantize,     panels,          dense_rows<uint16_t>, dense_rows<float>,
    rms_norm, weighted_sum,     attention_block, attention_join};

}  // namespace
const Kernels* const avx2_kernels = &table;
}  // namespace deepseek
#else
namespace deepseek {
const Kernels* const avx2_kernels = nullptr;
}
#endif
