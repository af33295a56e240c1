// One row of two_bits.h: included once for each instruction set. Sums are in FP64, number i in lane i % 16, lanes added in
// a tree: the same bits everywhere.
#pragma once
#include "bf16.h"
#include "moments_lanes.h"
#include "two_bits.h"

namespace deepseek {
namespace {

typedef double wide __attribute__((vector_size(sizeof(part))));
constexpr int kWide = sizeof(part) / 8;

INLINE wide load_wide(const float* p) {
#if defined(__AVX512F__)
  return (wide)_mm512_cvtps_pd(_mm256_loadu_ps(p));
#elif defined(BY_HALVES)
  return (wide)_mm256_cvtps_pd(_mm_loadu_ps(p));
#else
  wide v;
  for (int i = 0; i < kWide; ++i) v[i] = p[i];
  return v;
#endif
}

// Sixteen lanes of sums.
struct Sums {
  alignas(64) double lane[16] = {};
  double total() {
    for (int half = 8; half; half /= 2)
      for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
    return lane[0];
  }
};

// Of term(x), which takes vectors and single numbers.
template <typename Term>
INLINE double sum_of(const float* x, int64_t count, const Term& term) {
  constexpr int N = 16 / kWide;
  wide sum[N] = {};
  Sums sums;
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sum[n] += term(load_wide(x + i + n * kWide));
  for (int n = 0; n < N; ++n) std::memcpy(sums.lane + n * kWide, &sum[n], sizeof(wide));
  for (; i < count; ++i) sums.lane[i % 16] += term((double)x[i]);
  return sums.total();
}

// Means of the bins between three limits; 0 for an empty one.
INLINE void bin_means(const float* x, int64_t row, const float (&limit)[3], float (&mean)[4]) {
  typedef decltype(wide{} > wide{}) where;
  Sums sums[4];
  int64_t above[3] = {};
  const int64_t whole = row / 16 * 16;
  const double l0 = limit[0], l1 = limit[1], l2 = limit[2];
  for (int lane = 0; lane < 16; lane += kWide) {
    wide s0{}, s1{}, s2{}, s3{};
    where n0{}, n1{}, n2{};
    for (int64_t i = lane; i < whole; i += 16) {
      const wide v = load_wide(x + i);
      const where a0 = v > l0, a1 = v > l1, a2 = v > l2;
      s0 += (wide)((where)v & ~a0), s1 += (wide)((where)v & a0 & ~a1);
      s2 += (wide)((where)v & a1 & ~a2), s3 += (wide)((where)v & a2);
      n0 -= a0, n1 -= a1, n2 -= a2;
    }
    std::memcpy(sums[0].lane + lane, &s0, sizeof(wide)), std::memcpy(sums[1].lane + lane, &s1, sizeof(wide));
    std::memcpy(sums[2].lane + lane, &s2, sizeof(wide)), std::memcpy(sums[3].lane + lane, &s3, sizeof(wide));
    for (int i = 0; i < kWide; ++i) above[0] += n0[i], above[1] += n1[i], above[2] += n2[i];
  }
  for (int64_t i = whole; i < row; ++i) {
    int bin = 0;
    for (int n = 0; n < 3; ++n) bin += x[i] > limit[n], above[n] += x[i] > limit[n];
    sums[bin].lane[i % 16] += x[i];
  }
  const int64_t count[4] = {row - above[0], above[0] - above[1], above[1] - above[2], above[2]};
  for (int bin = 0; bin < 4; ++bin) mean[bin] = count[bin] ? (float)(sums[bin].total() / (double)count[bin]) : 0.0f;
}

// A bin's level for each lane; of its code the last two bits count.
INLINE part level_of(const float* level, ipart code) {
  part table;
  for (int i = 0; i < kLanes; ++i) table[i] = level[i % 4];
  return __builtin_shuffle(table, code);
}

// wanted: room for a row and a vector. code: a byte a number, up to a whole vector.
bool two_bits_row(const float* value, const float* less, const float* error, float decay, int64_t row, float* wanted,
                  uint8_t* payload, uint8_t* code, float* left) {
  if (less)
    for (int64_t i = 0; i < row; ++i) wanted[i] = value[i] - less[i];
  else
    std::memcpy(wanted, value, sizeof(float) * row);
  if (error)
    for (int64_t i = 0; i < row; ++i) wanted[i] += decay * error[i];
  std::memset(wanted + row, 0, sizeof(part));

  const double sum = sum_of(wanted, row, [](auto v) { return v; });
  if (!(sum - sum == 0.0)) return false;  // floats do not overflow an FP64 sum
  const double mean = sum / (double)row;
  auto square = [mean](auto v) { return (v - mean) * (v - mean); };
  const double edge = kEdge * __builtin_sqrt(sum_of(wanted, row, square) / (double)row);
  const float limit[3] = {(float)(mean - edge), (float)mean, (float)(mean + edge)};
  float level[4];
  bin_means(wanted, row, limit, level);
  for (int bin = 0; bin < 4; ++bin) {
    put_bf16(payload + 2 * bin, level[bin]);
    level[bin] = get_bf16(payload + 2 * bin);
  }

  for (int64_t i = 0; i < row; i += kLanes) {
    const part v = load_part(wanted + i);
    const ipart bin = -((v > limit[0]) + (v > limit[1]) + (v > limit[2]));
    put_bytes(code + i, bin);
    const part rest = v - level_of(level, bin);
    if (i + kLanes <= row)
      store_part(left + i, rest);
    else
      std::memcpy(left + i, &rest, sizeof(float) * (row - i));
  }
  return true;
}

// 4 `count` codes, a byte each -> four a byte, the first in the lowest bits.
void pack_two_bits(const uint8_t* code, int64_t count, uint8_t* packed) {
  auto pack = [](auto four) { return (four | four >> 6 | four >> 12 | four >> 18) & 0xff; };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    ipart four;
    std::memcpy(&four, code + 4 * i, sizeof(four));
    put_bytes(packed + i, pack(four));
  }
  for (; i < count; ++i) {
    uint32_t four;
    std::memcpy(&four, code + 4 * i, 4);
    packed[i] = (uint8_t)pack(four);
  }
}

// first: the row's first code in `packed`.
void of_two_bits_row(const uint8_t* payload, float weight, const uint8_t* packed, int64_t first, int64_t row, bool add,
                     float* out) {
  float level[4];
  for (int bin = 0; bin < 4; ++bin) level[bin] = get_bf16(payload + 2 * bin) * weight;
  int64_t i = 0;
  ipart shift;
  for (int n = 0; n < kLanes; ++n) shift[n] = 2 * n;
  if (first % 4 == 0)
    for (; i + kLanes <= row; i += kLanes) {
      int32_t codes = 0;
      std::memcpy(&codes, packed + (first + i) / 4, kLanes / 4);
      const part v = level_of(level, (ipart{} + codes) >> shift);
      store_part(out + i, add ? load_part(out + i) + v : v);
    }
  for (; i < row; ++i) {
    const float v = level[packed[(first + i) / 4] >> (first + i) % 4 * 2 & 3];
    out[i] = add ? out[i] + v : v;
  }
}

}  // namespace
}  // namespace deepseek
