#include "attention.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "rows.h"
#include "scratch.h"

namespace deepseek {
namespace {

thread_local Scratch scratch;  // of one operation
thread_local Scratch local;    // of one task

constexpr int64_t kRun = 8;  // groups of 16 lanes that meet a block of keys while it is in the cache

// Where the parts of attention_block lie: largest scores, sums of exponentials, sums of values.
int64_t part_size(int64_t width) { return 32 + 16 * width; }

void join(const float* parts, int64_t count, int64_t step, int64_t width, int64_t rows, float* out, int64_t ld) {
  if (!count)  // a query of padding
    for (int64_t r = 0; r < rows; ++r) std::memset(out + r * ld, 0, sizeof(float) * width);
  if (!count) return;
  static thread_local std::vector<const float*> part;
  part.resize(count);
  for (int64_t i = 0; i < count; ++i) part[i] = parts + i * step;
  kernels().attention_join(part.data(), count, width, rows, out, ld);
}

int64_t sequence_of(const Sequences& sequences, int64_t token) {
  return std::upper_bound(sequences.begin, sequences.begin + sequences.count + 1, token) - sequences.begin - 1;
}

// `lanes` rows of x become columns of [width][16].
void transpose(const float* x, int64_t stride, int64_t lanes, int64_t width, float* out) {
  for (int64_t d = 0; d < width; ++d)
    for (int64_t l = 0; l < 16; ++l) out[16 * d + l] = l < lanes ? x[l * stride + d] : 0.0f;
}

}  // namespace

void mla_prepare(const float* q, const float* kv, const float* norm, float eps, const Rotary& rotary,
                 const Sequences& sequences, int64_t heads, int64_t nope, int64_t rope, int64_t rank, float* q_rope,
                 float* cache, int threads) {
  const int64_t half = rope / 2;
  in_pieces(sequences.tokens(), 4, threads, [&](int64_t i) {
    const int64_t s = sequence_of(sequences, i);
    auto rotate = [&](const float* x, float* out) {
      for (int64_t p = 0; p < half; ++p) {
        float u = rotary.interleaved ? x[2 * p] : x[p], v = rotary.interleaved ? x[2 * p + 1] : x[p + half];
        float cos = rotary.cos[i * half + p], sin = rotary.sin[i * half + p];
        out[p] = u * cos - v * sin, out[p + half] = v * cos + u * sin;
      }
    };
    for (int64_t h = 0; h < heads; ++h)
      rotate(q + ((i * heads + h) * (nope + rope) + nope), q_rope + (i * heads + h) * rope);
    float* row = cache + sequences.row(s, sequences.past[s] + i - sequences.begin[s], rank + rope);
    kernels().rms_norm(kv + i * (rank + rope), norm, rank, eps, row);
    rotate(kv + i * (rank + rope) + rank, row + rank);
  });
}

void mla_absorbed(const float* q_latent, const float* q_rope, const float* cache, const Sequences& sequences,
                  int64_t heads, int64_t rank, int64_t rope, float scale, float* out, int threads) {
  // A group is 16 heads of one query; its blocks of keys are independent of each other.
  const int64_t width = rank + rope, lanes = divide_up(heads, 16), part = part_size(rank);
  const int64_t from = q_latent ? 0 : rank, depth = width - from;  // the numbers of a row that are multiplied
  auto gather = [&](int64_t query, int64_t lane, float* q) {  // -> [depth][16]
    const int64_t h0 = query * heads + lane * 16, n = std::min<int64_t>(16, heads - lane * 16);
    if (q_latent) transpose(q_latent + h0 * rank, rank, n, rank, q);
    transpose(q_rope + h0 * rope, rope, n, rope, q + 16 * (rank - from));
  };
  auto keys = [&](int64_t s, int64_t block, int64_t count) {
    const float* at = cache + sequences.blocks_of(s)[block];
    return Keys{at + from, at, width, count, depth, rank};
  };
  auto deliver = [&](int64_t query, int64_t lane, const float* parts, int64_t count, int64_t step) {
    join(parts, count, step, rank, std::min<int64_t>(16, heads - lane * 16), out + (query * heads + lane * 16) * rank,
         rank);
  };

  struct Run {
    int64_t s, t, count, lane;
  };
  std::vector<Run> runs;
  for (int64_t s = 0; s < sequences.count; ++s)
    for (int64_t t = 0; t < sequences.size(s); t += kRun)
      for (int64_t lane = 0; lane < lanes; ++lane) runs.push_back({s, t, std::min(kRun, sequences.size(s) - t), lane});
  if (sequences.tokens() > sequences.count && (int64_t)runs.size() >= 2 * threads) {  // a run of queries is a task
    auto most = [&](const Run& r) { return sequences.seen(r.s, r.t + r.count - 1); };
    std::stable_sort(runs.begin(), runs.end(), [&](const Run& a, const Run& b) { return most(a) > most(b); });
    parallel((int64_t)runs.size(), threads, [&](int64_t task) {
      const Run& r = runs[task];
      const int64_t n = r.count, blocks = divide_up(most(r), kKeys), first = sequences.begin[r.s] + r.t;
      local.reserve(Scratch::room<float>(n * 16 * depth) + Scratch::room<float>(n * blocks * part));
      float* q = local.take<float>(n * 16 * depth);
      float* parts = local.take<float>(n * blocks * part);  // [block][query]
      for (int64_t i = 0; i < n; ++i) gather(first + i, r.lane, q + i * 16 * depth);
      for (int64_t k = 0; k < blocks; ++k) {
        const float* at[kRun];
        float* to[kRun];
        int64_t count[kRun], some = 0;
        for (int64_t i = 0; i < n; ++i)
          if (int64_t seen = sequences.seen(r.s, r.t + i); seen > k * kKeys) {
            at[some] = q + i * 16 * depth, to[some] = parts + (k * n + i) * part;
            count[some++] = std::min(kKeys, seen - k * kKeys);
          }
        kernels().attention_block(at, some, keys(r.s, k, count[some - 1]), count, false, scale, to);
      }
      for (int64_t i = 0; i < n; ++i)
        deliver(first + i, r.lane, parts + i * part, divide_up(sequences.seen(r.s, r.t + i), kKeys), n * part);
    });
    return;
  }
  // Few queries: their blocks are shared out.
  struct Group {
    int64_t s, query, seen, lane;
  };
  std::vector<Group> groups;
  std::vector<int64_t> begin(1, 0);
  for (int64_t s = 0; s < sequences.count; ++s)
    for (int64_t t = 0; t < sequences.size(s); ++t)
      for (int64_t lane = 0; lane < lanes; ++lane) {
        groups.push_back({s, sequences.begin[s] + t, sequences.seen(s, t), lane});
        begin.push_back(begin.back() + divide_up(groups.back().seen, kKeys));
      }
  const int64_t count = (int64_t)groups.size();
  scratch.reserve(Scratch::room<float>(count * 16 * depth) + Scratch::room<float>(begin[count] * part));
  float* q = scratch.take<float>(count * 16 * depth);
  float* parts = scratch.take<float>(begin[count] * part);
  for (int64_t g = 0; g < count; ++g) gather(groups[g].query, groups[g].lane, q + g * 16 * depth);
  parallel(begin[count], threads, [&](int64_t task) {
    const int64_t g = std::upper_bound(begin.begin(), begin.end(), task) - begin.begin() - 1, block = task - begin[g];
    const int64_t some = std::min(kKeys, groups[g].seen - block * kKeys);
    const float* at = q + g * 16 * depth;
    float* to = parts + task * part;
    kernels().attention_block(&at, 1, keys(groups[g].s, block, some), &some, false, scale, &to);
  });
  for (int64_t g = 0; g < count; ++g)
    deliver(groups[g].query, groups[g].lane, parts + begin[g] * part, begin[g + 1] - begin[g], part);
}

void mla_naive(const float* q, const float* q_rope, const float* cache, const Sequences& sequences, int64_t heads,
               int64_t rank, int64_t rope, int64_t nope, int64_t value, const uint8_t* kv_b, int bits, float scale,
               float* out, int threads) {
  // A group is 16 queries of one head. A row of rebuilt numbers: rotary key, key, value, an odd number of cache lines from
  // the next. A head's rows of kv_b may begin within a panel: then up to 15 numbers too many lie before and after them.
  const int64_t depth = rope + nope, wide = divide_up(value, 16) * 16, part = part_size(wide);
  const int64_t pitch = (divide_up(rope + 15 + nope + wide + 15, 16) | 1) * 16;
  const Panel shape(rank, bits);

  // all visible latents, as the weights want them, once for all heads
  std::vector<int64_t> begin(1, 0);
  for (int64_t s = 0; s < sequences.count; ++s)
    begin.push_back(begin.back() + sequences.seen(s, sequences.size(s) - 1));
  scratch.reserve(Activations::room(begin.back(), rank, bits));
  const Activations latents(scratch, begin.back(), rank, bits);
  in_pieces(begin.back(), 8, threads, [&](int64_t i) {
    const int64_t s = std::upper_bound(begin.begin(), begin.end(), i) - begin.begin() - 1;
    latents.fill(i, cache + sequences.row(s, i - begin[s], rank + rope));
  });

  // A task is some runs of one head of one sequence, and all of them where that leaves nobody idle: each task rebuilds.
  const int64_t most = std::max<int64_t>(1, divide_up(2 * threads, sequences.count * heads));
  parallel(sequences.count * heads * most, threads, [&](int64_t task) {
    const int64_t piece = task % most, head = task / most % heads, s = task / most / heads;
    const int64_t tokens = sequences.size(s), groups = divide_up(tokens, 16), runs = divide_up(groups, kRun);
    const int64_t pieces = std::min(most, runs);
    if (piece >= pieces) return;
    const int64_t from = runs * piece / pieces * kRun, to = std::min(groups, runs * (piece + 1) / pieces * kRun);
    const int64_t rows = sequences.seen(s, std::min(tokens, to * 16) - 1), blocks = divide_up(rows, kKeys);
    local.reserve(Scratch::room<float>(rows * pitch) + Scratch::room<float>(kRun * 16 * depth) +
                  Scratch::room<float>(kRun * blocks * part) + Scratch::room<float>(16 * wide));
    float* row = local.take<float>(rows * pitch);
    float* lanes = local.take<float>(kRun * 16 * depth);
    float* parts = local.take<float>(kRun * blocks * part);  // [group][block]
    float* joined = local.take<float>(16 * wide);
    const int64_t first_row = head * (nope + value), panel = first_row / kRows, skip = first_row % kRows;
    panels_into(kv_b, shape, panel, divide_up(skip + nope + value, kRows), bits, latents.rows(begin[s]), rows,
                {row + rope - panel * kRows, pitch, heads * (nope + value)});
    for (int64_t j = 0; j < rows; ++j)
      std::memcpy(row + skip + j * pitch, cache + sequences.row(s, j, rank + rope) + rank, sizeof(float) * rope);
    for (int64_t g0 = from; g0 < to; g0 += kRun) {
      const int64_t n = std::min(kRun, to - g0);
      auto count = [&](int64_t i) { return sequences.past[s] + 16 * (g0 + i) + 1; };  // of the first query
      for (int64_t i = 0; i < n; ++i) {
        const int64_t t = 16 * (g0 + i), at = (sequences.begin[s] + t) * heads + head,
                      here = std::min<int64_t>(16, tokens - t);
        transpose(q_rope + at * rope, heads * rope, here, rope, lanes + i * 16 * depth);
        transpose(q + at * (nope + rope), heads * (nope + rope), here, nope, lanes + (i * depth + rope) * 16);
      }
      auto visible = [&](int64_t i) { return std::clamp<int64_t>(count(i) + 15, 0, rows); };
      for (int64_t k = 0; k < blocks; ++k) {
        const float* at[kRun];
        float* into[kRun];
        int64_t keys[kRun], some = 0;
        for (int64_t i = 0; i < n; ++i)
          if (visible(i) > k * kKeys) {
            at[some] = lanes + i * 16 * depth, into[some] = parts + (i * blocks + k) * part;
            keys[some++] = count(i) - k * kKeys;
          }
        if (!some) break;  // all later blocks are beyond them
        const float* key = row + skip + k * kKeys * pitch;
        kernels().attention_block(at, some, {key, key + depth, pitch, std::min(kKeys, rows - k * kKeys), depth, wide},
                                  keys, true, scale, into);
      }
      for (int64_t i = 0; i < n; ++i) {
        const int64_t t = 16 * (g0 + i), here = std::min<int64_t>(16, tokens - t), step = heads * value;
        float* to = out + ((sequences.begin[s] + t) * heads + head) * value;
        const bool whole = wide == value;
        join(parts + i * blocks * part, divide_up(visible(i), kKeys), part, wide, here, whole ? to : joined,
             whole ? step : wide);
        for (int64_t l = 0; !whole && l < here; ++l)
          std::memcpy(to + l * step, joined + l * wide, sizeof(float) * value);
      }
    }
  });
}

}  // namespace deepseek
