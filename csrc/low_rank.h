// What adapters add beside a product. Pointers are not checked here: ops/ did that.
#pragma once
#include <cstdint>
#include <vector>

namespace deepseek {

// One adapter's matrices: a [rank, columns], b [rank, rows], the transpose of B. Rank 0: it has none here.
struct LowRank {
  const float *a, *b;
  int64_t rank;
};

// y[t, :] += sum over i of weight[t, i] * B_i (A_i x[t, :]), rank by rank, i ascending, by fused multiply-adds; an adapter
// of weight 0 is left out. weight: [tokens][adapters].
void add_low_rank(const float* x, int64_t tokens, int64_t columns, const std::vector<LowRank>& adapters,
                  const float* weight, int64_t rows, float* y, int threads);

}  // namespace deepseek
