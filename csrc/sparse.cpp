#include "sparse.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>

#include "bf16.h"
#include "scratch.h"

namespace deepseek {
namespace {

constexpr int64_t kLevels = 8, kPlaces = kBest * 3 / 2, kCodes = kBest / 4;  // bytes of a chunk
constexpr int kShift = 20;  // magnitudes are tallied by their exponent and 3 bits of their fraction

// Places of the largest of a chunk's magnitudes, in order; of equal ones the first. size: bits of the magnitudes.
void find_largest(const uint32_t* size, uint16_t* place) {
  uint16_t tally[1 << (31 - kShift)] = {};
  for (int64_t i = 0; i < kChunk; ++i) ++tally[size[i] >> kShift];
  uint32_t step = 1 << (31 - kShift);
  for (int64_t some = 0; some < kBest;) some += tally[--step];
  uint16_t near[kChunk];
  int64_t count = 0;
  for (int64_t i = 0; i < kChunk; ++i) near[count] = (uint16_t)i, count += size[i] >= step << kShift;
  uint32_t order[kChunk];
  for (int64_t i = 0; i < count; ++i) order[i] = size[near[i]];
  std::nth_element(order, order + kBest - 1, order + count, std::greater<uint32_t>());
  const uint32_t least = order[kBest - 1];
  int64_t equal = kBest;
  for (int64_t i = 0; i < kBest; ++i) equal -= order[i] > least;
  for (int64_t i = 0, kept = 0; kept < kBest; ++i)
    if (size[near[i]] > least || (size[near[i]] == least && equal-- > 0)) place[kept++] = near[i];
}

bool encode_chunk(const float* value, const float* less, const float* error, float decay, int64_t count,
                  uint8_t* levels, uint8_t* places, uint8_t* codes, float* left) {
  float wanted[kChunk];
  uint32_t size[kChunk], top = 0;
  if (less)
    for (int64_t i = 0; i < count; ++i) wanted[i] = value[i] - less[i];
  else
    std::copy_n(value, count, wanted);
  if (error)
    for (int64_t i = 0; i < count; ++i) wanted[i] += decay * error[i];
  std::fill(wanted + count, wanted + kChunk, 0.0f);
  std::memcpy(size, wanted, sizeof(size));
  for (int64_t i = 0; i < kChunk; ++i) size[i] &= 0x7fffffff, top = std::max(top, size[i]);
  if (top >= 0x7f800000) return false;

  uint16_t place[kBest];
  find_largest(size, place);
  auto magnitude = [&](int64_t k) { return std::abs(wanted[place[k]]); };
  double sum = 0.0, sums[4] = {};
  int64_t counts[4] = {};
  for (int64_t k = 0; k < kBest; ++k) sum += magnitude(k);
  const float mean = (float)(sum / (double)kBest);
  uint8_t code[kBest];
  for (int64_t k = 0; k < kBest; ++k) {
    const float x = wanted[place[k]];
    code[k] = (uint8_t)(2 * (x > 0.0f) + (magnitude(k) > mean));
    sums[code[k]] += x, ++counts[code[k]];
  }
  for (int bin = 0; bin < 4; ++bin)
    put_bf16(levels + 2 * bin, counts[bin] ? (float)(sums[bin] / (double)counts[bin]) : 0.0f);
  for (int64_t k = 0; k < kBest; ++k) wanted[place[k]] -= get_bf16(levels + 2 * code[k]);
  std::copy_n(wanted, count, left);
  for (int64_t k = 0; k < kBest; k += 2, places += 3) {
    const uint32_t both = place[k] | (uint32_t)place[k + 1] << 12;
    for (int i = 0; i < 3; ++i) places[i] = (uint8_t)(both >> 8 * i);
  }
  for (int64_t k = 0; k < kBest; k += 4)
    codes[k / 4] = (uint8_t)(code[k] | code[k + 1] << 2 | code[k + 2] << 4 | code[k + 3] << 6);
  return true;
}

}  // namespace

bool encode_sparse(const float* value, const float* less, const float* error, float decay, int64_t count,
                   uint8_t* payload, float* left, int threads) {
  const int64_t chunks = divide_up(count, kChunk);
  uint8_t *places = payload + kLevels * chunks, *codes = places + kPlaces * chunks;
  std::atomic<bool> finite{true};
  in_pieces(chunks, 4, threads, [&](int64_t c) {
    const int64_t at = c * kChunk;
    if (!encode_chunk(value + at, less ? less + at : nullptr, error ? error + at : nullptr, decay,
                      std::min(kChunk, count - at), payload + kLevels * c, places + kPlaces * c, codes + kCodes * c,
                      left + at))
      finite = false;
  });
  return finite;
}

void add_sparse(const uint8_t* payload, int64_t count, float weight, float* out, int threads) {
  const int64_t chunks = divide_up(count, kChunk);
  const uint8_t *places = payload + kLevels * chunks, *codes = places + kPlaces * chunks;
  in_pieces(chunks, 16, threads, [&](int64_t c) {
    float level[4];
    for (int bin = 0; bin < 4; ++bin) level[bin] = get_bf16(payload + kLevels * c + 2 * bin) * weight;
    for (int64_t k = 0; k < kBest; ++k) {
      const uint8_t* two = places + kPlaces * c + k / 2 * 3;
      const int64_t at = c * kChunk + (k % 2 ? two[1] >> 4 | two[2] << 4 : two[0] | (two[1] & 15) << 8);
      if (at < count) out[at] += level[codes[kCodes * c + k / 4] >> k % 4 * 2 & 3];
    }
  });
}

}  // namespace deepseek
