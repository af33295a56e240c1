// Chunks of 4,096 numbers of which the 64 largest are kept, in two bits each (ops/sparse.py says the arithmetic and the
// payload's form; its torch form gives the same bytes).
#pragma once
#include <cstdint>

namespace deepseek {

constexpr int64_t kChunk = 4096, kBest = 64;

// Codes value - less + decay * error, filled up with zeros to whole chunks; `less` and `error` may be null. payload: of all
// chunks BF16 means (8 bytes), then places (96), then codes (16). left: what the payload leaves out. False, and results of
// no use, where a number to be coded is not finite.
bool encode_sparse(const float* value, const float* less, const float* error, float decay, int64_t count,
                   uint8_t* payload, float* left, int threads);

// out += weight * what the payload stands for.
void add_sparse(const uint8_t* payload, int64_t count, float weight, float* out, int threads);

}  // namespace deepseek
