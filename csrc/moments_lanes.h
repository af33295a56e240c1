// One block of moments.h in sixteen-float vectors: included once for each instruction set.
#pragma once
#include "lanes.h"
#include "moments.h"

namespace deepseek {
namespace {

typedef uint32_t u16 __attribute__((vector_size(64), aligned(64)));

// Sixteen codes of 8 bits, T of either sign.
template <typename T>
INLINE f16 from_codes(const T* p) {
  constexpr bool SIGNED = std::is_signed<T>::value;
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128((const __m128i*)p);
  return (f16)_mm512_cvtepi32_ps(SIGNED ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
#elif defined(BY_HALVES)
  Halves wide;
  for (int i = 0; i < 2; ++i) {
    const __m128i bytes = _mm_loadl_epi64((const __m128i*)(p + 8 * i));
    wide.half[i] = (f8)_mm256_cvtepi32_ps(SIGNED ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
  }
  return wide.whole;
#else
  f16 wide;
  for (int i = 0; i < 16; ++i) wide[i] = (float)p[i];
  return wide;
#endif
}

// The lowest byte of each.
template <typename T>
INLINE void put_codes(T* p, i16 v) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)v));
#elif defined(BY_HALVES)
  __m256i half[2];
  v &= 0xff;
  std::memcpy(half, &v, 64);
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(half[0], half[1]), 0xd8);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
#else
  for (int i = 0; i < 16; ++i) p[i] = (T)v[i];
#endif
}

INLINE f16 root(f16 v) {
#if defined(__AVX512F__)
  return (f16)_mm512_sqrt_ps((__m512)v);
#elif defined(BY_HALVES)
  return by_halves([](f8 v) { return (f8)_mm256_sqrt_ps((__m256)v); }, v);
#else
  for (int i = 0; i < 16; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

INLINE f16 sixteen(const float* p, int64_t count) { return count >= 16 ? load(p) : load_some(p, count); }
INLINE void put_sixteen(float* p, f16 v, int64_t count) {
  if (count >= 16)
    store(p, v);
  else
    std::memcpy(p, &v, 4 * count);
}

// 1 / peak, or 0 where a block counts as zeros.
inline float inverse_of(float peak) { return peak > 1e-30f && peak < __builtin_inff() ? 1.0f / peak : 0.0f; }

// In [0, 1), of 24 bits: a hash of the number's place (its constants: Chris Wellons, "lowbias32").
INLINE f16 dither(u16 place) {
  u16 h = place;
  h ^= h >> 16;
  h *= 0x7feb352du;
  h ^= h >> 15;
  h *= 0x846ca68bu;
  h ^= h >> 16;
  return to_float((i16)(h >> 8)) * 5.9604644775390625e-8f;
}

// place: of the block's first number. count: numbers that are there.
void adamw8_block(float* weight, const float* gradient, int64_t count, uint32_t place, int8_t* first,
                  float* first_scale, uint8_t* second, float* second_scale, const AdamwStep& by) {
  alignas(64) float m_of[kMoments], u_of[kMoments];
  f16 m_top = all(0.0f), u_top = all(0.0f);
  const float m_by = *first_scale * (float)(1.0 / (127.0 * 127.0)), u_by = *second_scale * (float)(1.0 / (255.0 * 255.0));
  for (int64_t i = 0; i < kMoments; i += 16) {
    f16 g = count > i ? sixteen(gradient + i, count - i) : all(0.0f);
    f16 m = from_codes(first + i), u = from_codes(second + i);
    m = m * absolute(m) * m_by, u = u * u * u_by;
    m = m * by.beta1 + g * by.rest1;
    u = root(u * u * by.beta2 + g * g * by.rest2);
    if (count > i) {
      f16 w = sixteen(weight + i, count - i);
      put_sixteen(weight + i, w * by.decay - m / (u * by.root_scale + by.eps) * by.size, count - i);
    }
    store(m_of + i, m), store(u_of + i, u);
    m_top = larger(m_top, absolute(m)), u_top = larger(u_top, u);
  }
  *first_scale = largest(m_top), *second_scale = largest(u_top);
  const float m_inverse = inverse_of(*first_scale), u_inverse = inverse_of(*second_scale);
  u16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int64_t i = 0; i < kMoments; i += 16) {
    f16 m = load(m_of + i), u = load(u_of + i);
    f16 code = nearest(root(absolute(m) * m_inverse) * 127.0f);
    put_codes(first + i, to_int((f16)((i16)code | ((i16)m & (int32_t)0x80000000))));
    f16 x = root(u * u_inverse) * 255.0f, x2 = x * x;
    f16 k = to_float(to_int(x)), k2 = k * k, above_k = k + 1.0f, above_k2 = above_k * above_k;
    f16 gap = above_k2 * above_k2 - k2 * k2, part = x2 * x2 - k2 * k2;  // of the second moment itself
    f16 up = dither((lane + (place + (uint32_t)i)) * 0x9e3779b9u + by.seed) * gap;
    i16 c = to_int(k) - above(part, up);
    c = larger(c, -above(u * u_inverse, all(0.0f)));  // no root of 0 below a moment that is not
    put_codes(second + i, -larger(-c, i16{} - 255));
  }
}

void momentum8_block(const float* gradient, int64_t count, int8_t* momentum, float* scale, float beta, float rest,
                     float* ahead) {
  alignas(64) float m_of[kMoments];
  f16 top = all(0.0f);
  const float by = *scale * (float)(1.0 / 127.0);
  for (int64_t i = 0; i < kMoments; i += 16) {
    f16 g = count > i ? sixteen(gradient + i, count - i) * rest : all(0.0f);
    f16 m = from_codes(momentum + i) * by * beta + g;
    if (count > i) put_sixteen(ahead + i, m * beta + g, count - i);
    store(m_of + i, m);
    top = larger(top, absolute(m));
  }
  *scale = largest(top);
  const float inverse = inverse_of(*scale);
  for (int64_t i = 0; i < kMoments; i += 16) put_codes(momentum + i, to_int(nearest(load(m_of + i) * inverse * 127.0f)));
}

}  // namespace
}  // namespace deepseek
