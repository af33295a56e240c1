#include "two_bits.h"

#include <algorithm>
#include <atomic>

#include "scratch.h"
#include "training.h"

namespace deepseek {
namespace {

thread_local Scratch room;  // of one task
constexpr int64_t kTask = 1 << 14;  // numbers

}  // namespace

bool encode_two_bits(const float* value, const float* less, const float* error, float decay, int64_t rows, int64_t row,
                     uint8_t* payload, float* left, int threads) {
  const TrainingKernels& run = training_kernels();
  const int64_t piece = 4 * divide_up(kTask, 4 * row);  // rows whose codes begin and end with a byte
  std::atomic<bool> finite{true};
  parallel(divide_up(rows, piece), threads, [&](int64_t task) {
    const int64_t begin = task * piece, end = std::min(rows, begin + piece);
    room.reserve(Scratch::room<float>(row + 16) + Scratch::room<uint8_t>(row + 20));
    float* wanted = room.take<float>(row + 16);
    uint8_t* code = room.take<uint8_t>(row + 20);
    uint8_t* packed = payload + 8 * rows + begin * row / 4;
    int64_t held = 0;  // codes that have not filled a byte yet
    for (int64_t r = begin; r < end; ++r) {
      const int64_t at = r * row;
      if (!run.two_bits_row(value + at, less ? less + at : nullptr, error ? error + at : nullptr, decay, row, wanted,
                            payload + 8 * r, code + held, left + at)) {
        finite = false;
        return;
      }
      const int64_t bytes = (held + row) / 4;
      run.pack_two_bits(code, bytes, packed);
      packed += bytes, held = (held + row) % 4;
      std::copy_n(code + 4 * bytes, held, code);
    }
    std::fill_n(code + held, 4, 0);
    run.pack_two_bits(code, held > 0, packed);
  });
  return finite;
}

void decode_two_bits(const uint8_t* payload, int64_t rows, int64_t row, float weight, bool add, float* out,
                     int threads) {
  const TrainingKernels& run = training_kernels();
  in_pieces(rows, divide_up(kTask, row), threads, [&](int64_t r) {
    run.of_two_bits_row(payload + 8 * r, weight, payload + 8 * rows, r * row, row, add, out + r * row);
  });
}

}  // namespace deepseek
