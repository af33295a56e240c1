// Attention over keys and values in memory, sixteen floats at a time; included by each instruction set, as lanes.h is.
#pragma once
#include "lanes.h"

namespace deepseek {
namespace {

constexpr int kQueries = 2;  // queries that share the keys they load

// Lanes l with l > last, of the part that begins with lane `first`: those that see a key `last` beyond the ones that all
// lanes see.
INLINE ipart lanes_after(int64_t last, int first) {
  ipart lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane + first > (int32_t)last;
}
INLINE i16 lanes_after(int64_t last) {
  constexpr i16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return lane > (int32_t)last;
}

// Q queries, the earlier ones seeing no more keys than the later ones. What a lane does not see is left out, not
// multiplied by zero: nothing of a later position reaches an earlier one, not even a NaN.
template <int Q>
__attribute__((noinline))  // inlined, its sums land in memory
void attention_queries(const float* const* q, const Keys& keys, const int64_t* count, bool ramp, float scale,
                       float* const* result) {
  constexpr int N = 8 / kParts;  // keys, then dimensions, at a time: N x Q sums stay in registers
  alignas(64) float p[Q][kKeys * 16];
  int64_t full[Q], end[Q];  // keys that all lanes see, that any lane sees
  for (int i = 0; i < Q; ++i) {
    full[i] = count[i] < 0 ? 0 : count[i] < keys.count ? count[i] : keys.count;
    end[i] = !ramp ? full[i] : count[i] + 15 < keys.count ? count[i] + 15 : keys.count;
  }
  const int64_t most = end[Q - 1], least = full[0];
  for (int64_t j = 0; j < most; j += N) {
    const float* key[N];
    for (int n = 0; n < N; ++n) key[n] = keys.key + (j + n < most ? j + n : most - 1) * keys.stride;
    for (int lane = 0; lane < 16; lane += kLanes) {
      part s[Q][N];
#pragma GCC unroll 2
      for (int i = 0; i < Q; ++i)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) s[i][n] = part{};
      for (int64_t d = 0; d < keys.depth; ++d) {
        part v[Q];
#pragma GCC unroll 2
        for (int i = 0; i < Q; ++i) v[i] = load_part(q[i] + 16 * d + lane);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
          part k = each(key[n][d]);
#pragma GCC unroll 2
          for (int i = 0; i < Q; ++i) add_product(s[i][n], v[i], k);
        }
      }
#pragma GCC unroll 2
      for (int i = 0; i < Q; ++i)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n)
          if (j + n < most) store_part(p[i] + 16 * (j + n) + lane, s[i][n] * scale);
    }
  }
  for (int i = 0; i < Q; ++i) {
    f16 best = all(-__builtin_inff()), z = all(0.0f);
    for (int64_t j = 0; j < full[i]; ++j) best = larger(best, load(p[i] + 16 * j));
    for (int64_t j = full[i]; j < end[i]; ++j)
      best = choose(lanes_after(j - count[i]), larger(best, load(p[i] + 16 * j)), best);
    for (int64_t j = 0; j < end[i]; ++j) {
      const f16 v = load(p[i] + 16 * j);
      f16 e = choose(equal(v, v), exponential(v - best), v);
      if (j >= full[i]) e = (f16)((i16)e & lanes_after(j - count[i]));
      store(p[i] + 16 * j, e);
      z = z + e;
    }
    store(result[i], best);
    store(result[i] + 16, z);
  }
  for (int64_t d = 0; d < keys.width; d += N)
    for (int lane = 0; lane < 16; lane += kLanes) {
      part acc[Q][N];
#pragma GCC unroll 2
      for (int i = 0; i < Q; ++i)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) acc[i][n] = part{};
      const float* value = keys.value + d;
      for (int64_t j = 0; j < least; ++j, value += keys.stride) {
        part e[Q];
#pragma GCC unroll 2
        for (int i = 0; i < Q; ++i) e[i] = load_part(p[i] + 16 * j + lane);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
          part v = each(value[n]);
#pragma GCC unroll 2
          for (int i = 0; i < Q; ++i) add_product(acc[i][n], e[i], v);
        }
      }
#pragma GCC unroll 2
      for (int i = 0; i < Q; ++i)
        for (int64_t j = least; j < end[i]; ++j) {
          const float* row = keys.value + j * keys.stride + d;
          const ipart seen = j < full[i] ? ipart{} == 0 : lanes_after(j - count[i], lane);
          const part e = load_part(p[i] + 16 * j + lane);
#pragma GCC unroll 8
          for (int n = 0; n < N; ++n) acc[i][n] = seen ? fma(e, each(row[n]), acc[i][n]) : acc[i][n];
        }
#pragma GCC unroll 2
      for (int i = 0; i < Q; ++i)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) store_part(result[i] + 32 + 16 * (d + n) + lane, acc[i][n]);
    }
}

void attention_block(const float* const* q, int64_t queries, const Keys& keys, const int64_t* count, bool ramp,
                     float scale, float* const* result) {
  int64_t i = 0;
  for (; i + kQueries <= queries; i += kQueries)
    attention_queries<kQueries>(q + i, keys, count + i, ramp, scale, result + i);
  for (; i < queries; ++i) attention_queries<1>(q + i, keys, count + i, ramp, scale, result + i);
}

void attention_join(const float* const* parts, int64_t count, int64_t width, int64_t rows, float* out, int64_t ld) {
  f16 best = load(parts[0]);
  for (int64_t i = 1; i < count; ++i) best = larger(best, load(parts[i]));
  f16 z = all(0.0f);
  for (int64_t i = 0; i < count; ++i) z = fma(exponential(load(parts[i]) - best), load(parts[i] + 16), z);
  z = choose(equal(best, all(-__builtin_inff())), all(1.0f), z);  // a lane that sees nothing gets zeros
  constexpr int D = 16;  // dimensions at a time
  for (int64_t d = 0; d < width; d += D) {
    f16 acc[D];
    for (int n = 0; n < D; ++n) acc[n] = all(0.0f);
    for (int64_t i = 0; i < count; ++i) {
      f16 w = exponential(load(parts[i]) - best);
      for (int n = 0; n < D; ++n) acc[n] = fma(w, load(parts[i] + 32 + 16 * (d + n)), acc[n]);
    }
    for (int n = 0; n < D; ++n) acc[n] = acc[n] / z;
    for (int64_t h = 0; h < rows; ++h) {
      f16 row;
      for (int n = 0; n < D; ++n) row[n] = acc[n][h];
      store(out + h * ld + d, row);
    }
  }
}

}  // namespace
}  // namespace deepseek
