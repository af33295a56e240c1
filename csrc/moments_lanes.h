// One block of moments.h in parts of a vector: included once for each instruction set.
#pragma once
#include "lanes.h"
#include "moments.h"

namespace deepseek {
namespace {

typedef uint32_t upart __attribute__((vector_size(sizeof(part))));
constexpr int32_t kSign = INT32_MIN;
constexpr uint32_t kGolden = 0x9e3779b9u;

// As many bytes as a part has lanes, T of either sign.
template <typename T>
INLINE ipart from_bytes(const T* p) {
  [[maybe_unused]] constexpr bool SIGNED = std::is_signed<T>::value;
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128((const __m128i*)p);
  return (ipart)(SIGNED ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
#elif defined(BY_HALVES)
  const __m128i bytes = _mm_loadl_epi64((const __m128i*)p);
  return (ipart)(SIGNED ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
#else
  ipart wide;
  for (int i = 0; i < kLanes; ++i) wide[i] = p[i];
  return wide;
#endif
}

// The lowest byte of each.
template <typename T>
INLINE void put_bytes(T* p, ipart v) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)v));
#elif defined(BY_HALVES)
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i)(v & 0xff), __m256i{}), 0xd8);
  _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(_mm256_castsi256_si128(words), __m128i{}));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = (T)v[i];
#endif
}

// top / peak, or 0 where a block counts as zeros.
inline float inverse_of(float peak, float top) {
  return peak > 1e-30f && peak < __builtin_inff() ? 1.0f / peak * top : 0.0f;
}

// A code is what is left of a float without its last 19 bits: 4 of its fraction, 3 or 4 of its exponent, which says how
// often the smallest one was doubled. The smallest are chosen so that these bits of theirs are 0.
constexpr int kCut = 19;
constexpr int32_t kFirst = 0x3c000000, kSecond = 0x38000000;  // 2^-7, 2^-15
constexpr float kFirstBase = 0x1p-7f, kSecondBase = 0x1p-15f - 0x1p-19f;  // 0 is not among the second moments
constexpr float kFirstTop = 1.9375f - kFirstBase, kSecondTop = 1.875f - kSecondBase;  // of codes 127 and 254

// Weights and gradients as they are stored: FP32, or BF16, to which a sum is rounded up or down by chance, so that its mean
// is kept (a step is often less than half of what BF16 can tell apart).
INLINE part get(const float* p) { return load_part(p); }
INLINE part get(const uint16_t* p) { return part_from_bf16(p); }
INLINE void put(float* p, part v, upart) { store_part(p, v); }
INLINE void put(uint16_t* p, part v, upart chance) {
  const upart bits = ((upart)v + (chance >> 16)) >> 16;
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)bits));
#elif defined(BY_HALVES)
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)bits, __m256i{}), 0xd8);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(words));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = (uint16_t)bits[i];
#endif
}

// 32 bits of each place: golden-ratio steps from `seed`; and these mixed.
INLINE upart draws(uint32_t place, uint32_t seed) {
  upart draw;
  for (int i = 0; i < kLanes; ++i) draw[i] = (place + i) * kGolden + seed;
  return draw;
}
INLINE upart mixed(upart draw) {
  draw = (draw ^ draw >> 15) * 0x846ca68bu;
  return draw ^ draw >> 16;
}

// size / root of x, a positive number, to 7e-7: from its bits (Jan Kadlec's constants), then a step of Newton's.
INLINE part over_root(part x, float size) {
  part y = (part)(0x5f1ffff9 - ((ipart)x >> 1));
  y = y * (2.38924456f - x * y * y);
  return y * (size * 1.05592838f - x * (size * 0.174421338f) * y * y);
}

// place: of the block's first number.
template <typename W>
void adamw8_block(W* weight, const W* gradient, uint32_t place, uint8_t* first, float* first_scale,
                  uint8_t* second, float* second_scale, const AdamwStep& by) {
  alignas(64) float m_of[kMoments], v_of[kMoments];
  part m_top = {}, v_top = {};
  const float m_by = *first_scale * by.beta1 * (1.0f / kFirstTop);
  const float v_by = *second_scale * by.beta2 * (1.0f / kSecondTop);
  upart chance = draws(place, by.weight_seed);
  for (int64_t i = 0; i < kMoments; i += kLanes, chance += kLanes * kGolden) {
    const part g = get(gradient + i);
    const ipart c = (ipart)from_bytes((const int8_t*)first + i) << kCut;  // its sign goes up to the last bit
    const part base = (part)((c & kSign) | kFirst);
    const part m = ((part)((c & (kSign | 0x7f << kCut)) | kFirst) - base) * m_by + g * by.rest1;
    const part v = ((part)(from_bytes(second + i) << kCut | kSecond) - kSecondBase) * v_by + g * g * by.rest2;
    put(weight + i, get(weight + i) * by.decay - m * over_root(v + by.least, by.size), mixed(chance));
    store_part(m_of + i, m), store_part(v_of + i, v);
    m_top = larger(m_top, (part)((ipart)m & ~kSign)), v_top = larger(v_top, v);
  }
  *first_scale = largest(m_top), *second_scale = largest(v_top);
  const float m_inverse = inverse_of(*first_scale, kFirstTop), v_inverse = inverse_of(*second_scale, kSecondTop);
  upart draw = draws(place, by.seed);
  for (int64_t i = 0; i < kMoments; i += kLanes, draw += kLanes * kGolden) {
    __builtin_prefetch(weight + kMoments + i), __builtin_prefetch(gradient + kMoments + i);
    const part m = load_part(m_of + i), v = load_part(v_of + i);
    const ipart near = (ipart)((part)((ipart)m & ~kSign) * m_inverse + kFirstBase) + (1 << (kCut - 1));
    put_bytes(first + i, (near >> kCut & 0x7f) | ((ipart)m >> 24 & 0x80));
    const ipart low = (ipart)larger(v * v_inverse + kSecondBase, each(0x1p-15f));
    put_bytes(second + i, (low + (ipart)(draw >> (32 - kCut))) >> kCut);
  }
}

void moved_block(uint16_t* weight, const float* by, uint32_t place, float decay, float size, uint32_t seed) {
  upart chance = draws(place, seed);
  for (int64_t i = 0; i < kMoments; i += kLanes, chance += kLanes * kGolden)
    put(weight + i, get(weight + i) * decay - get(by + i) * size, mixed(chance));
}

void momentum8_block(const float* gradient, int8_t* momentum, float* scale, float beta, float rest, float* ahead) {
  alignas(64) float m_of[kMoments];
  part top = {};
  const float by = *scale * (float)(1.0 / 127.0);
  for (int64_t i = 0; i < kMoments; i += kLanes) {
    const part g = load_part(gradient + i) * rest;
    const part m = __builtin_convertvector(from_bytes(momentum + i), part) * by * beta + g;
    store_part(ahead + i, m * beta + g);
    store_part(m_of + i, m);
    top = larger(top, (part)((ipart)m & ~kSign));
  }
  *scale = largest(top);
  const float inverse = inverse_of(*scale, 1.0f);
  for (int64_t i = 0; i < kMoments; i += kLanes)
    put_bytes(momentum + i, __builtin_convertvector(nearest(load_part(m_of + i) * inverse * 127.0f), ipart));
}

}  // namespace
}  // namespace deepseek
