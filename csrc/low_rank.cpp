#include "low_rank.h"

#include <algorithm>

#include "kernels.h"
#include "scratch.h"

namespace deepseek {
namespace {

constexpr int64_t kMany = 64;   // rows of a task at most
constexpr int64_t kWide = 128;  // columns of all B that stay in the first cache while the rows of a task pass

}  // namespace

void add_low_rank(const float* x, int64_t tokens, int64_t columns, const std::vector<LowRank>& adapters,
                  const float* weight, int64_t rows, float* y, int threads) {
  const Kernels& k = kernels();
  const int64_t count = (int64_t)adapters.size();
  int64_t ranks = 0, most = 0;
  for (const LowRank& one : adapters) ranks += one.rank, most = std::max(most, one.rank);
  if (!ranks || !tokens) return;
  const Rows all{nullptr, nullptr, nullptr, 0, x, columns};
  const int64_t piece = std::min(kMany, divide_up(divide_up(tokens, 4 * threads), 4) * 4);
  parallel(divide_up(tokens, piece), threads, [&](int64_t task) {
    static thread_local Scratch local;
    const int64_t first = task * piece, n = std::min(piece, tokens - first);
    local.reserve(Scratch::room<float>(n * ranks) + Scratch::room<float>(n * most) + Scratch::room<int32_t>(n) +
                  Scratch::room<int64_t>(n) + Scratch::room<const float*>(ranks));
    float* factor = local.take<float>(n * ranks);  // w A x of a row's adapters, side by side
    float* product = local.take<float>(n * most);
    int32_t* row = local.take<int32_t>(n);
    int64_t* filled = local.take<int64_t>(n);
    const float** from = local.take<const float*>(ranks);
    std::fill(filled, filled + n, 0);
    for (int64_t i = 0; i < count; ++i) {
      const LowRank& one = adapters[i];
      int64_t some = 0;
      for (int64_t t = first; t < first + n && one.rank; ++t)
        if (weight[t * count + i] != 0.0f) row[some++] = (int32_t)t;
      if (!some) continue;
      for (int64_t j = 0; j < one.rank * rows; j += 16) __builtin_prefetch(one.b + j, 0, 2);
      k.fp32_rows(one.a, nullptr, one.rank, all, row, some, product, one.rank);
      for (int64_t s = 0; s < some; ++s) {
        int64_t& at = filled[row[s] - first];
        float* to = factor + (row[s] - first) * ranks + at;
        for (int64_t r = 0; r < one.rank; ++r) to[r] = weight[row[s] * count + i] * product[s * one.rank + r];
        at += one.rank;
      }
    }
    for (int64_t c = 0; c < rows; c += kWide)
      for (int64_t t = 0; t < n; ++t) {
        if (!filled[t]) continue;
        const float** next = from;
        for (int64_t i = 0; i < count; ++i)
          for (int64_t r = 0; r < adapters[i].rank && weight[(first + t) * count + i] != 0.0f; ++r)
            *next++ = adapters[i].b + r * rows + c;
        float* to = y + (first + t) * rows + c;
        k.weighted_sum(from, factor + t * ranks, filled[t], to, std::min(kWide, rows - c), to);
      }
  });
}

}  // namespace deepseek
