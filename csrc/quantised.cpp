#include "quantised.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace deepseek {
namespace {

// Memory for one call's intermediates, kept between calls by each calling thread.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  // Starts over with room for `bytes`.
  void reserve(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      data_ = nullptr, size_ = 0;
      data_ = static_cast<char*>(std::aligned_alloc(64, bytes));
      if (!data_) throw std::bad_alloc();
      size_ = bytes;
    }
    used_ = 0;
  }
  template <typename T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(data_ + used_);
    used_ += room<T>(count);
    return p;
  }
  template <typename T>
  static size_t room(int64_t count) {
    return (sizeof(T) * count + 63) / 64 * 64;
  }

 private:
  char* data_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

thread_local Scratch scratch;  // of one operation
thread_local Scratch block;    // of a block made of operations
thread_local Scratch whole;    // of a layer made of blocks

size_t rows_room(int64_t rows, int64_t columns) {
  int64_t blocks = blocks_of(columns);
  return Scratch::room<int8_t>(rows * pitch_of(blocks)) + Scratch::room<int32_t>(rows * blocks) +
         Scratch::room<float>(rows);
}

// Activations of `rows` rows, to be filled by `fill`.
struct Quantised {
  int8_t* q;
  int32_t* surplus;
  float* scale;
  int64_t blocks;
  Quantised(int64_t rows, int64_t columns) : blocks(blocks_of(columns)) {
    q = scratch.take<int8_t>(rows * pitch_of(blocks)), surplus = scratch.take<int32_t>(rows * blocks);
    scale = scratch.take<float>(rows);
  }
  void fill(int64_t row, const float* x, int64_t columns) const {
    kernels().quantise(x, columns, q + row * pitch_of(blocks), surplus + row * blocks, scale + row);
  }
  Rows rows(int64_t first = 0) const {
    return {q + first * pitch_of(blocks), surplus + first * blocks, scale + first, blocks};
  }
};

// Runs work(i) for i < count, a few at a time: for items too small to be tasks of their own.
template <typename Work>
void in_pieces(int64_t count, int64_t at_least, int threads, const Work& work) {
  int64_t piece = std::max(at_least, (count + 4 * threads - 1) / (4 * threads));
  parallel((count + piece - 1) / piece, threads, [&](int64_t i) {
    for (int64_t j = i * piece; j < std::min(count, (i + 1) * piece); ++j) work(j);
  });
}

// Into how many pieces a thread's share of the work is cut. Few tokens: small ones, because the last piece is waited for;
// many: large ones, because activations are looked up once a piece.
int64_t pieces_of(int64_t tokens) { return tokens < 8 ? 64 : 16; }

// How many panels (an even number) one task takes, so that there are about `wanted` tasks.
int64_t panels_a_task(int64_t panels, int64_t wanted) {
  int64_t n = (panels + wanted - 1) / std::max<int64_t>(wanted, 1);
  return std::max<int64_t>(2, (n + 1) / 2 * 2);
}

// Panels write whole sixteens; a matrix whose rows are no multiple of 16 gets its last panel from a buffer.
struct Target {
  float* out;
  int64_t ld, rows;
};

void panels_into(const uint8_t* w, const Panel& shape, int64_t from, int64_t count, int bits, const Rows& x,
                 const int32_t* row, int64_t tokens, const Target& to) {
  const Kernels& k = kernels();
  bool cut = (from + count) * kRows > to.rows;
  int64_t whole = cut ? count - 1 : count;
  if (whole) k.panels(w + from * shape.bytes, whole, bits, false, x, row, tokens, to.out + from * kRows, to.ld);
  if (!cut) return;
  constexpr int64_t kSome = 64;
  alignas(64) float last[kSome * kRows];
  int64_t start = (from + whole) * kRows;
  for (int64_t t = 0; t < tokens; t += kSome) {
    int64_t n = std::min(kSome, tokens - t);
    Rows part = x;
    if (!row) part.q += t * pitch_of(x.blocks), part.surplus += t * x.blocks, part.scale += t;
    k.panels(w + (from + whole) * shape.bytes, 1, bits, false, part, row ? row + t : nullptr, n, last, kRows);
    for (int64_t i = 0; i < n; ++i)
      std::memcpy(to.out + (t + i) * to.ld + start, last + i * kRows, sizeof(float) * (to.rows - start));
  }
}

}  // namespace

void quantise_panels(const float* w, int64_t rows, int64_t columns, int bits, uint8_t* out, double* squares,
                     int threads) {
  const Panel shape(columns, bits);
  std::vector<double> part(2 * panels_of(rows), 0.0);
  in_pieces(panels_of(rows), 1, threads, [&](int64_t p) {
    std::vector<float> room(3 * (columns + kBlock)), none(columns);
    for (int64_t r = 0; r < kRows; ++r) {
      const float* row = p * kRows + r < rows ? w + (p * kRows + r) * columns : none.data();
      kernels().quantise_weights(row, columns, bits, r, out + p * shape.bytes, room.data(), &part[2 * p]);
    }
  });
  squares[0] = squares[1] = 0.0;
  for (size_t i = 0; i < part.size(); ++i) squares[i % 2] += part[i];
}

void quantised_linear(const float* x, int64_t tokens, int64_t groups, int64_t columns, const uint8_t* w, int64_t stride,
                      int64_t rows, int bits, float* out, int threads) {
  const Panel shape(columns, bits);
  const int64_t panels = panels_of(rows);
  scratch.reserve(rows_room(tokens * groups, columns));
  const Quantised a(tokens * groups, columns);  // [group][token]
  in_pieces(tokens * groups, 4, threads, [&](int64_t i) {
    a.fill(i, x + ((i % tokens) * groups + i / tokens) * columns, columns);
  });
  int64_t piece = panels_a_task(panels, groups > 1 ? 1 : pieces_of(tokens) * threads), pieces = (panels + piece - 1) / piece;
  parallel(pieces * groups, threads, [&](int64_t task) {
    int64_t g = task / pieces, from = task % pieces * piece, n = std::min(piece, panels - from);
    panels_into(w + g * stride, shape, from, n, bits, a.rows(g * tokens), nullptr, tokens,
                {out + g * rows, groups * rows, rows});
  });
}

void quantised_experts(const float* x, int64_t tokens, int64_t hidden, const int64_t* index, const float* weight,
                       int64_t top, const uint8_t* const* experts, int64_t num_experts, int64_t inner,
                       const uint8_t* shared, int64_t shared_inner, int bits, float* out, int threads) {
  struct Mlp {
    const uint8_t* w;
    int64_t inner, first, count;  // its rows among the sorted pairs
    int64_t h;                    // where its intermediate rows begin, in numbers
  };
  const Kernels& k = kernels();
  const int64_t pairs = tokens * top, all = pairs + (shared ? tokens : 0);
  const Panel in(hidden, bits);
  auto padded = [](int64_t n) { return blocks_of(n) * kBlock; };

  // sort pairs by expert, stable
  std::vector<int32_t> token(all), slot(pairs);
  std::vector<int64_t> start(num_experts + 1, 0);
  for (int64_t i = 0; i < pairs; ++i) ++start[index[i] + 1];
  for (int64_t e = 0; e < num_experts; ++e) start[e + 1] += start[e];
  std::vector<int64_t> next(start.begin(), start.end() - 1);
  for (int64_t i = 0; i < pairs; ++i) {
    int64_t at = next[index[i]]++;
    token[at] = (int32_t)(i / top), slot[i] = (int32_t)at;
  }
  std::vector<Mlp> mlps;
  int64_t h_numbers = 0;
  auto add = [&](const uint8_t* w, int64_t i, int64_t first, int64_t count) {
    mlps.push_back({w, i, first, count, h_numbers});
    h_numbers += count * padded(i);
  };
  if (shared) {
    for (int64_t t = 0; t < tokens; ++t) token[pairs + t] = (int32_t)t;
    add(shared, shared_inner, pairs, tokens);
  }
  for (int64_t e = 0; e < num_experts; ++e)
    if (start[e + 1] > start[e]) add(experts[e], inner, start[e], start[e + 1] - start[e]);

  const int64_t hp = panels_of(hidden) * kRows;
  scratch.reserve(rows_room(tokens, hidden) + Scratch::room<float>(h_numbers) + Scratch::room<float>(all * hp) +
                  rows_room(pairs, inner) + rows_room(shared ? tokens : 0, std::max<int64_t>(shared_inner, 1)) + 1024);
  const Quantised a(tokens, hidden);
  float* h = scratch.take<float>(h_numbers);
  float* y = scratch.take<float>(all * hp);
  const Quantised routed(pairs, inner), own(shared ? tokens : 0, std::max<int64_t>(shared_inner, 1));

  in_pieces(tokens, 4, threads, [&](int64_t t) { a.fill(t, x + t * hidden, hidden); });

  // Tasks: runs of panels of one MLP. Few tokens: pieces small enough to share out evenly; many: one piece suffices.
  struct Task {
    const Mlp* mlp;
    int64_t from, count;
  };
  auto cut = [&](auto panels_of_mlp) {
    int64_t panels = 0;
    for (const Mlp& m : mlps) panels += panels_of_mlp(m);
    int64_t piece = panels_a_task(panels, pieces_of(tokens) * threads);
    std::vector<Task> tasks;
    for (const Mlp& m : mlps)
      for (int64_t p = 0, n = panels_of_mlp(m); p < n; p += piece) tasks.push_back({&m, p, std::min(piece, n - p)});
    return tasks;
  };

  auto tasks = cut([](const Mlp& m) { return 2 * panels_of(m.inner); });
  parallel((int64_t)tasks.size(), threads, [&](int64_t i) {
    const Task& task = tasks[i];
    const Mlp& m = *task.mlp;
    k.panels(m.w + task.from * in.bytes, task.count, bits, true, a.rows(), token.data() + m.first, m.count,
             h + m.h + task.from / 2 * kRows, padded(m.inner));
  });

  in_pieces(all, 4, threads, [&](int64_t i) {  // rows of h are padded to whole blocks; what lies beyond `inner` is ignored
    bool is_routed = i < pairs;
    const Mlp& m = is_routed ? *(std::upper_bound(mlps.begin() + (shared ? 1 : 0), mlps.end(), i,
                                                  [](int64_t v, const Mlp& e) { return v < e.first; }) - 1)
                             : mlps.front();
    (is_routed ? routed : own).fill(is_routed ? i : i - pairs, h + m.h + (i - m.first) * padded(m.inner), m.inner);
  });

  tasks = cut([&](const Mlp&) { return panels_of(hidden); });
  parallel((int64_t)tasks.size(), threads, [&](int64_t i) {
    const Task& task = tasks[i];
    const Mlp& m = *task.mlp;
    const Panel shape(m.inner, bits);
    const uint8_t* down = m.w + 2 * panels_of(m.inner) * in.bytes;
    bool is_routed = m.first < pairs;
    k.panels(down + task.from * shape.bytes, task.count, bits, false,
             is_routed ? routed.rows(m.first) : own.rows(), nullptr, m.count, y + m.first * hp + task.from * kRows, hp);
  });

  in_pieces(tokens, 4, threads, [&](int64_t t) {
    std::vector<const float*> rows(top);
    for (int64_t i = 0; i < top; ++i) rows[i] = y + slot[t * top + i] * hp;
    k.weighted_sum(rows.data(), weight + t * top, top, shared ? y + (pairs + t) * hp : nullptr, hidden,
                   out + t * hidden);
  });
}

void panel_linear(const float* x, int64_t tokens, int64_t groups, int64_t columns, int64_t token_stride,
                  int64_t group_stride, const void* w, bool bf16, int64_t rows, float* out, int threads) {
  const int64_t panels = rows / kRows;
  const Kernels& k = kernels();
  auto run = [&](int64_t g, int64_t p, int64_t count, int64_t t, int64_t n) {
    const int64_t at = (g * panels + p) * kRows * columns;
    const float* from = x + t * token_stride + g * group_stride;
    float* to = out + (t * groups + g) * rows + p * kRows;
    if (bf16)
      k.bf16_panels(static_cast<const uint16_t*>(w) + at, count, columns, from, token_stride, n, to, groups * rows);
    else
      k.fp32_panels(static_cast<const float*>(w) + at, count, columns, from, token_stride, n, to, groups * rows);
  };
  if (tokens >= 48) {  // many tokens: share them out, and a group's matrix stays in the cache
    const int64_t piece = 48, pieces = (tokens + piece - 1) / piece;
    parallel(groups * pieces, threads, [&](int64_t task) {
      const int64_t t = task % pieces * piece;
      run(task / pieces, 0, panels, t, std::min(piece, tokens - t));
    });
    return;
  }
  const int64_t piece = std::max<int64_t>(1, panels * groups / (8 * threads));
  parallel((panels * groups + piece - 1) / piece, threads, [&](int64_t task) {
    for (int64_t i = task * piece; i < std::min(panels * groups, (task + 1) * piece); ++i)
      run(i / panels, i % panels, 1, 0, tokens);
  });
}

namespace {

// The `count` largest of v, descending, equal values by index; `taken` marks them.
void largest(const float* v, int64_t n, int64_t count, int64_t* index, std::vector<char>& taken) {
  taken.assign(n, 0);
  for (int64_t i = 0; i < count; ++i) {
    int64_t best = -1;
    for (int64_t e = 0; e < n; ++e)
      if (!taken[e] && (best < 0 || v[e] > v[best])) best = e;
    taken[best] = 1;
    index[i] = best;
  }
}

}  // namespace

void choose_experts(const float* logits, int64_t tokens, const Gate& gate, const float* bias, float* scores,
                    int64_t* index, float* weight, int threads) {
  const int64_t experts = gate.experts, per_group = experts / gate.groups;
  in_pieces(tokens, 8, threads, [&](int64_t t) {
    const float* x = logits + t * experts;
    float* s = scores + t * experts;
    int64_t* picked = index + t * gate.top;
    float* w = weight + t * gate.top;
    float top = *std::max_element(x, x + experts), sum = 0.0f;
    for (int64_t e = 0; e < experts; ++e) {
      s[e] = gate.sigmoid ? 1.0f / (1.0f + std::exp(-x[e])) : std::exp(x[e] - top);
      sum += s[e];
    }
    if (!gate.sigmoid)
      for (int64_t e = 0; e < experts; ++e) s[e] /= sum;
    std::vector<float> choice(s, s + experts);
    if (bias)
      for (int64_t e = 0; e < experts; ++e) choice[e] += bias[e];
    std::vector<char> taken;
    if (gate.group_best) {
      std::vector<float> group(gate.groups, 0.0f);
      std::vector<int64_t> best(std::max<int64_t>(gate.group_best, gate.kept_groups));
      for (int64_t g = 0; g < gate.groups; ++g) {
        largest(choice.data() + g * per_group, per_group, gate.group_best, best.data(), taken);
        for (int i = 0; i < gate.group_best; ++i) group[g] += choice[g * per_group + best[i]];
      }
      largest(group.data(), gate.groups, gate.kept_groups, best.data(), taken);
      for (int64_t e = 0; e < experts; ++e)
        if (!taken[e / per_group]) choice[e] = -std::numeric_limits<float>::infinity();
    }
    largest(choice.data(), experts, gate.top, picked, taken);
    sum = 0.0f;
    for (int64_t i = 0; i < gate.top; ++i) sum += w[i] = s[picked[i]];
    const float scale = !gate.normalise || gate.scale_anyway ? gate.scale : 1.0f;
    for (int64_t i = 0; i < gate.top; ++i) w[i] = (gate.normalise ? w[i] / (sum + 1e-20f) : w[i]) * scale;
  });
}

void mla_prepare(const float* q, const float* kv, const float* norm, float eps, const Rotary& rotary, int64_t batch,
                 int64_t tokens, int64_t heads, int64_t nope, int64_t rope, int64_t rank, float* q_rope, float* cache,
                 int64_t stride, int64_t past, int threads) {
  const int64_t half = rope / 2;
  in_pieces(batch * tokens, 4, threads, [&](int64_t i) {
    const int64_t b = i / tokens, t = i % tokens, angle = (rotary.per_sequence ? i : t) * half;
    auto rotate = [&](const float* x, float* out) {
      for (int64_t p = 0; p < half; ++p) {
        float u = rotary.interleaved ? x[2 * p] : x[p], v = rotary.interleaved ? x[2 * p + 1] : x[p + half];
        float c = rotary.cos[angle + p], s = rotary.sin[angle + p];
        out[p] = u * c - v * s, out[p + half] = v * c + u * s;
      }
    };
    for (int64_t h = 0; h < heads; ++h)
      rotate(q + ((i * heads + h) * (nope + rope) + nope), q_rope + (i * heads + h) * rope);
    float* row = cache + b * stride + (past + t) * (rank + rope);
    kernels().rms_norm(kv + i * (rank + rope), norm, rank, eps, row);
    rotate(kv + i * (rank + rope) + rank, row + rank);
  });
}

void rms_norm(const float* x, int64_t tokens, int64_t width, int64_t stride, const float* w, float eps, float* out,
              int threads) {
  in_pieces(tokens, std::max<int64_t>(1, 16384 / width), threads,
            [&](int64_t t) { kernels().rms_norm(x + t * stride, w, width, eps, out + t * width); });
}

namespace {

constexpr int64_t kKeys = 128;  // as in lanes.h; blocks count from the first visible position
constexpr int64_t kRun = 8;     // queries of one task: they meet a block of keys while it is in the cache

// Positions that a query sees: first … last.
struct Span {
  int64_t first, last;
  int64_t blocks() const { return (last - first) / kKeys + 1; }
  int64_t keys(int64_t block) const { return std::min(kKeys, last + 1 - first - block * kKeys); }
};

}  // namespace

void mla_attention(const float* q_latent, const float* q_rope, const float* cache, int64_t stride, const int64_t* first,
                   const int64_t* past, int64_t batch, int64_t tokens, int64_t heads, int64_t rank, int64_t rope,
                   float scale, float* out, int threads) {
  const int64_t width = rank + rope, lanes = (heads + 15) / 16, part_size = 32 + 16 * rank;
  // A unit is 16 heads of one query; its blocks of keys are independent of each other.
  auto span = [&](int64_t b, int64_t t) {  // a query of padding, which sees nothing, sees itself: rubbish, but finite
    return Span{std::min(first[b], past[b] + t), past[b] + t};
  };
  auto transpose = [&](int64_t query, int64_t lane, float* q) {  // -> [rank + rope][16]
    const int64_t h0 = lane * 16, n = std::min<int64_t>(16, heads - h0);
    if (n < 16) std::memset(q, 0, sizeof(float) * 16 * width);
    for (int64_t h = 0; h < n; ++h) {
      const float* latent = q_latent + (query * heads + h0 + h) * rank;
      for (int64_t d = 0; d < rank; ++d) q[16 * d + h] = latent[d];
      const float* turned = q_rope + (query * heads + h0 + h) * rope;
      for (int64_t d = 0; d < rope; ++d) q[16 * (rank + d) + h] = turned[d];
    }
  };
  auto join = [&](int64_t query, int64_t lane, const float* parts, int64_t count, int64_t step) {
    std::vector<const float*> top(count), norm(count), sum(count);
    for (int64_t i = 0; i < count; ++i) top[i] = parts + i * step, norm[i] = top[i] + 16, sum[i] = top[i] + 32;
    kernels().mla_join(top.data(), norm.data(), sum.data(), count, rank, std::min<int64_t>(16, heads - lane * 16),
                       out + (query * heads + lane * 16) * rank, rank);
  };
  auto keys = [&](int64_t b, int64_t position) { return cache + b * stride + position * width; };

  const int64_t runs = (tokens + kRun - 1) / kRun;
  if (tokens > 1 && batch * runs * lanes >= 2 * threads) {  // a run of queries is a task, the longest first
    parallel(batch * runs * lanes, threads, [&](int64_t task) {
      const int64_t lane = task % lanes, b = task / lanes % batch, t0 = (runs - 1 - task / lanes / batch) * kRun;
      const int64_t n = std::min(kRun, tokens - t0), most = span(b, t0 + n - 1).blocks();
      scratch.reserve(Scratch::room<float>(n * 16 * width) + Scratch::room<float>(n * most * part_size));
      float* q = scratch.take<float>(n * 16 * width);
      float* parts = scratch.take<float>(n * most * part_size);  // [block][query]
      for (int64_t i = 0; i < n; ++i) transpose(b * tokens + t0 + i, lane, q + i * 16 * width);
      for (int64_t k = 0; k < most; ++k) {
        const float* at[kRun];
        float* to[kRun];
        int64_t count[kRun], some = 0;
        for (int64_t i = 0; i < n; ++i) {
          const Span s = span(b, t0 + i);
          at[some] = q + i * 16 * width, to[some] = parts + (k * n + i) * part_size;
          if (s.first < first[b]) {  // padding: a block of its own
            const int64_t one = 1;
            if (k == 0) kernels().mla_block(at + some, 1, keys(b, s.first), width, &one, rank, rope, scale, to + some);
          } else if (k < s.blocks()) {
            count[some++] = s.keys(k);
          }
        }
        if (some)
          kernels().mla_block(at, some, keys(b, first[b] + k * kKeys), width, count, rank, rope, scale, to);
      }
      for (int64_t i = 0; i < n; ++i)
        join(b * tokens + t0 + i, lane, parts + i * part_size, span(b, t0 + i).blocks(), n * part_size);
    });
    return;
  }
  // Few queries: their blocks are shared out.
  const int64_t units = batch * tokens * lanes;
  std::vector<int64_t> begin(units + 1, 0);
  for (int64_t u = 0; u < units; ++u) begin[u + 1] = begin[u] + span(u / lanes / tokens, u / lanes % tokens).blocks();
  scratch.reserve(Scratch::room<float>(units * 16 * width) + Scratch::room<float>(begin[units] * part_size));
  float* q = scratch.take<float>(units * 16 * width);
  float* parts = scratch.take<float>(begin[units] * part_size);
  for (int64_t u = 0; u < units; ++u) transpose(u / lanes, u % lanes, q + u * 16 * width);
  parallel(begin[units], threads, [&](int64_t task) {
    const int64_t u = std::upper_bound(begin.begin(), begin.end(), task) - begin.begin() - 1, b = u / lanes / tokens;
    const Span s = span(b, u / lanes % tokens);
    const int64_t block = task - begin[u], count = s.keys(block);
    const float* at = q + u * 16 * width;
    float* to = parts + task * part_size;
    kernels().mla_block(&at, 1, keys(b, s.first + block * kKeys), width, &count, rank, rope, scale, &to);
  });
  for (int64_t u = 0; u < units; ++u)
    join(u / lanes, u % lanes, parts + begin[u] * part_size, begin[u + 1] - begin[u], part_size);
}

namespace {

void add_bias(float* y, int64_t tokens, int64_t width, const float* bias) {
  if (!bias) return;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < width; ++i) y[t * width + i] += bias[i];
}

void mla_forward(const Mla& m, const float* x, int64_t batch, int64_t tokens, const float* cos, const float* sin,
                 bool per_sequence, float* cache, int64_t stride, const int64_t* first, int64_t past, float* out,
                 int threads) {
  const int64_t n = batch * tokens, width = m.heads * (m.nope + m.rope), latent = m.rank + m.rope;
  block.reserve(Scratch::room<float>(n * m.q_rank) * 2 + Scratch::room<float>(n * width) +
                Scratch::room<float>(n * latent) + Scratch::room<float>(n * m.heads * m.rope) +
                Scratch::room<float>(n * m.heads * m.rank) * 2 + Scratch::room<float>(n * m.heads * m.value) +
                Scratch::room<int64_t>(batch));
  float* q = block.take<float>(n * width);
  if (m.q_rank) {
    float* a = block.take<float>(n * m.q_rank);
    float* normed = block.take<float>(n * m.q_rank);
    quantised_linear(x, n, 1, m.hidden, m.q_a, 0, m.q_rank, m.bits, a, threads);
    add_bias(a, n, m.q_rank, m.q_a_bias);
    rms_norm(a, n, m.q_rank, m.q_rank, m.q_norm, m.q_eps, normed, threads);
    quantised_linear(normed, n, 1, m.q_rank, m.q_b, 0, width, m.bits, q, threads);
  } else {
    quantised_linear(x, n, 1, m.hidden, m.q_b, 0, width, m.bits, q, threads);
  }
  float* kv = block.take<float>(n * latent);
  quantised_linear(x, n, 1, m.hidden, m.kv_a, 0, latent, m.bits, kv, threads);
  add_bias(kv, n, latent, m.kv_a_bias);
  float* q_rope = block.take<float>(n * m.heads * m.rope);
  mla_prepare(q, kv, m.kv_norm, m.kv_eps, {cos, sin, per_sequence, m.interleaved}, batch, tokens, m.heads, m.nope,
              m.rope, m.rank, q_rope, cache, stride, past, threads);
  float* q_latent = block.take<float>(n * m.heads * m.rank);
  panel_linear(q, n, m.heads, m.nope, width, m.nope + m.rope, m.key, true, m.rank, q_latent, threads);
  float* summed = block.take<float>(n * m.heads * m.rank);
  int64_t* pasts = block.take<int64_t>(batch);
  std::fill(pasts, pasts + batch, past);
  mla_attention(q_latent, q_rope, cache, stride, first, pasts, batch, tokens, m.heads, m.rank, m.rope, m.scale, summed,
                threads);
  float* values = block.take<float>(n * m.heads * m.value);
  const int64_t panel = Panel(m.rank, m.bits).bytes;
  quantised_linear(summed, n, m.heads, m.rank, m.kv_b + m.nope / kRows * panel, (m.nope + m.value) / kRows * panel,
                   m.value, m.bits, values, threads);
  quantised_linear(values, n, 1, m.heads * m.value, m.o, 0, m.hidden, m.bits, out, threads);
  add_bias(out, n, m.hidden, m.o_bias);
}

void ffn_forward(const Ffn& f, const float* x, int64_t tokens, int64_t hidden, float* scores, int64_t* index,
                 float* weight, float* out, int threads) {
  const int64_t experts = f.gate.experts, rows = panels_of(experts) * kRows;
  if (experts) {
    block.reserve(Scratch::room<float>(tokens * rows));
    float* logits = block.take<float>(tokens * rows);
    panel_linear(x, tokens, 1, hidden, hidden, hidden, f.gate_weight, f.gate_bf16, rows, logits, threads);
    if (rows != experts)
      for (int64_t t = 1; t < tokens; ++t) std::copy_n(logits + t * rows, experts, logits + t * experts);
    choose_experts(logits, tokens, f.gate, f.gate_bias, scores, index, weight, threads);
  }
  quantised_experts(x, tokens, hidden, index, weight, f.gate.top, f.experts, experts, f.inner, f.shared, f.shared_inner,
                    f.bits, out, threads);
}

void add(float* y, const float* x, int64_t tokens, int64_t width, int threads) {
  in_pieces(tokens, 16, threads, [&](int64_t t) {
    for (int64_t i = t * width; i < (t + 1) * width; ++i) y[i] = x[i] + y[i];
  });
}

}  // namespace

void layer_forward(const Layer& layer, const float* x, int64_t batch, int64_t tokens, const float* cos, const float* sin,
                   bool per_sequence, float* cache, int64_t stride, const int64_t* first, int64_t past, float* scores,
                   int64_t* index, float* weight, float* out, int threads) {
  const int64_t n = batch * tokens, hidden = layer.mla.hidden;
  whole.reserve(Scratch::room<float>(n * hidden) * 2);
  float* normed = whole.take<float>(n * hidden);
  float* attended = whole.take<float>(n * hidden);
  rms_norm(x, n, hidden, hidden, layer.attention_norm, layer.eps, normed, threads);
  mla_forward(layer.mla, normed, batch, tokens, cos, sin, per_sequence, cache, stride, first, past, attended, threads);
  add(attended, x, n, hidden, threads);
  rms_norm(attended, n, hidden, hidden, layer.ffn_norm, layer.eps, normed, threads);
  ffn_forward(layer.ffn, normed, n, hidden, scores, index, weight, out, threads);
  add(out, attended, n, hidden, threads);
}

}  // namespace deepseek
