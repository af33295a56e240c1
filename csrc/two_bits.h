// Rows of numbers in two bits each: the bin that a number is in, and the mean of each of a row's four bins
// (ops/two_bits.py says the arithmetic and the payload's form; its torch form gives the same bytes).
#pragma once
#include <cstdint>

namespace deepseek {

constexpr double kEdge = 0.98;  // of an outer bin, in standard deviations

// Codes value - less + decay * error; `less` and `error` may be null. payload: 8 bytes a row, BF16 means of the bins, then
// the codes, four a byte. left: what the payload leaves out. False, and results of no use, where a number to be coded is
// not finite.
bool encode_two_bits(const float* value, const float* less, const float* error, float decay, int64_t rows, int64_t row,
                     uint8_t* payload, float* left, int threads);

// out = weight * what the payload stands for; `add`: out += that.
void decode_two_bits(const uint8_t* payload, int64_t rows, int64_t row, float weight, bool add, float* out,
                     int threads);

}  // namespace deepseek
