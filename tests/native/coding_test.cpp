// What goes over the wire: rows by every table of kernels, and whole tensors by other numbers of threads.
#include <algorithm>

#include "../../csrc/sparse.h"
#include "../../csrc/training.h"
#include "../../csrc/two_bits.h"
#include "check.h"

namespace deepseek {

void test_two_bits(const Kernels& table) {
  const TrainingKernels& run = &table == scalar_kernels ? *scalar_training
                               : &table == avx2_kernels ? *avx2_training
                                                        : *avx512_training;
  for (int64_t row : {1, 3, 15, 16, 17, 44, 100, 512})
    for (int repeat = 0; repeat < 10; ++repeat) {
      const std::string where = at(table, {row});
      Exact<float> value(row, 1), less(row, 3), error(row, 2), wanted(row + 16), left(row, 1), left_want(row);
      random_row(value.get(), row), random_row(less.get(), row), random_row(error.get(), row);
      const float* minus = repeat % 2 ? less.get() : nullptr;
      const float* lost = repeat % 3 ? error.get() : nullptr;
      Exact<uint8_t> code(row + 16, 1), level(8, 3), level_want(8);
      const int64_t bytes = (row + 3) / 4;
      Exact<uint8_t> packed(bytes, 1), packed_want(bytes);
      auto encode = [&](const TrainingKernels& by, Exact<uint8_t>& levels, Exact<float>& rest, Exact<uint8_t>& out) {
        const bool finite =
            by.two_bits_row(value.get(), minus, lost, 0.9f, row, wanted.get(), levels.get(), code.get(), rest.get());
        for (int64_t i = row; i < 4 * bytes; ++i) code[i] = 0;
        by.pack_two_bits(code.get(), bytes, out.get());
        return finite;
      };
      Exact<bool> finite(1), finite_want(1);
      finite[0] = encode(run, level, left, packed);
      finite_want[0] = encode(*scalar_training, level_want, left_want, packed_want);
      same(finite, finite_want, "verdict", where);
      if (!finite[0]) continue;
      same(level, level_want, "means", where), same(left, left_want, "rest", where);
      same(packed, packed_want, "codes", where);
      for (int64_t first : {0, 1, 3})
        for (bool add : {false, true}) {
          Exact<float> out(row - std::min(row, first), 1), want(out.size());
          out.fill([] { return 1.5f; }), want.fill([] { return 1.5f; });
          run.of_two_bits_row(level.get(), 0.3f, packed.get(), first, out.size(), add, out.get());
          scalar_training->of_two_bits_row(level.get(), 0.3f, packed.get(), first, out.size(), add, want.get());
          same(out, want, "numbers", where);
        }
    }
}

void test_coding() {
  const int64_t lines = 600, line = 77, sent = 8 * lines + (lines * line + 3) / 4;
  Exact<float> change(lines * line), rest(lines * line);
  change.fill(normal), rest.fill(normal);
  on_threads("encode_two_bits", lines * line + (sent + 3) / 4, [&](float* out, int threads) {
    encode_two_bits(change.get(), nullptr, rest.get(), 0.9f, lines, line, (uint8_t*)(out + lines * line), out, threads);
  });
  Exact<uint8_t> payload(sent, 1);
  encode_two_bits(change.get(), nullptr, nullptr, 1.0f, lines, line, payload.get(), rest.get(), 1);
  on_threads("decode_two_bits", lines * line,
             [&](float* out, int threads) { decode_two_bits(payload.get(), lines, line, 0.5f, false, out, threads); });
  const int64_t count = 40001, places = 120 * ((count + kChunk - 1) / kChunk);
  Exact<float> some(count, 1), lost(count);
  some.fill(normal), lost.fill([] { return (float)below(5); });
  Exact<uint8_t> best(places, 1);
  on_threads("encode_sparse", count + places / 4, [&](float* out, int threads) {
    encode_sparse(some.get(), lost.get(), lost.get(), 0.5f, count, best.get(), out, threads);
    std::memcpy(out + count, best.get(), places);
  });
  on_threads("add_sparse", count, [&](float* out, int threads) { add_sparse(best.get(), count, 0.5f, out, threads); });
}

}  // namespace deepseek
