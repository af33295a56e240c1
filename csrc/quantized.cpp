#include "quantized.h"

#include <algorithm>
#include <stdexcept>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels.h"
#include "rows.h"
#include "scratch.h"

namespace deepseek {
namespace {

thread_local Scratch scratch;  // of one operation

constexpr int64_t kCrowd = 96;  // tokens of one MLP that are worth a task from end to end

// Into how many pieces a thread's share of the work is cut. Few tokens: small ones, because the last piece is waited for;
// many: large ones, because activations are looked up once a piece.
int64_t pieces_of(int64_t tokens) { return tokens < 8 ? 64 : 16; }

// How many rows of activations a task quantizes at least: fewer are done sooner than shared out.
int64_t rows_a_task(int64_t columns) { return std::max<int64_t>(4, 16384 / std::max<int64_t>(columns, 1)); }

// How many panels (an even number) one task takes, so that there are about `wanted` tasks.
int64_t panels_a_task(int64_t panels, int64_t wanted) {
  int64_t n = divide_up(panels, std::max<int64_t>(wanted, 1));
  return std::max<int64_t>(2, (n + 1) / 2 * 2);
}

}  // namespace

void quantize_panels(const float* w, int64_t rows, int64_t columns, int bits, uint8_t* out, double* squares,
                     int threads) {
  const Panel shape(columns, bits);
  std::vector<double> part(2 * panels_of(rows), 0.0);
  in_pieces(panels_of(rows), 1, threads, [&](int64_t p) {
    std::vector<float> room(3 * (columns + kBlock)), none(columns);
    for (int64_t r = 0; r < kRows; ++r) {
      const float* row = p * kRows + r < rows ? w + (p * kRows + r) * columns : none.data();
      kernels().quantize_weights(row, columns, bits, r, out + p * shape.bytes, room.data(), &part[2 * p]);
    }
  });
  squares[0] = squares[1] = 0.0;
  for (size_t i = 0; i < part.size(); ++i) squares[i % 2] += part[i];
}

void quantized_linears(const float* x, int64_t tokens, int64_t columns, const std::vector<Product>& products, int bits,
                       int threads) {
  const Panel shape(columns, bits);
  scratch.reserve(Activations::room(tokens, columns, bits));
  const Activations a(scratch, tokens, columns, bits);
  in_pieces(tokens, rows_a_task(columns), threads, [&](int64_t t) { a.fill(t, x + t * columns); });
  int64_t panels = 0, tasks = 0;
  for (const Product& p : products) panels += panels_of(p.rows);
  const int64_t piece = panels_a_task(panels, pieces_of(tokens) * threads);
  for (const Product& p : products) tasks += divide_up(panels_of(p.rows), piece);
  parallel(tasks, threads, [&](int64_t task) {
    const Product* p = products.data();
    for (int64_t n; task >= (n = divide_up(panels_of(p->rows), piece)); ++p) task -= n;
    const int64_t from = task * piece;
    panels_into(p->w, shape, from, std::min(piece, panels_of(p->rows) - from), bits, a.rows(), tokens,
                {p->out, p->rows, p->rows});
  });
}

void quantized_groups(const float* x, int64_t tokens, int64_t groups, int64_t columns, int64_t token_stride,
                      int64_t group_stride, const uint8_t* w, int64_t stride, int64_t rows, int bits, float* out,
                      int threads) {
  const Panel shape(columns, bits);
  scratch.reserve(Activations::room(tokens * groups, columns, bits));
  const Activations a(scratch, tokens * groups, columns, bits);  // [group][token]
  in_pieces(tokens * groups, rows_a_task(columns), threads,
            [&](int64_t i) { a.fill(i, x + i % tokens * token_stride + i / tokens * group_stride); });
  parallel(groups, threads, [&](int64_t g) {
    panels_into(w + g * stride, shape, 0, panels_of(rows), bits, a.rows(g * tokens), tokens,
                {out + g * rows, groups * rows, rows});
  });
}

void quantized_experts(const float* x, int64_t tokens, int64_t hidden, const int64_t* index, const float* weight,
                       int64_t top, const uint8_t* const* experts, int64_t num_experts, int64_t inner,
                       const uint8_t* shared, int64_t shared_inner, int bits, float* out, int threads,
                       const Fetch& fetch) {
  struct Mlp {
    const uint8_t* w;
    int64_t inner, first, count;  // its rows among the sorted pairs
    int64_t h, row;  // where its intermediate rows begin, in numbers, and its rows among those of a wave
  };
  const Kernels& k = kernels();
  const int64_t pairs = tokens * top, all = pairs + (shared ? tokens : 0);
  const Panel in(hidden, bits);
  auto padded = [](int64_t n) { return blocks_of(n) * kBlock; };

  // sort pairs by expert, stable; those of the shared MLP come last
  std::vector<int32_t> token(all), slot(pairs);
  std::vector<int64_t> start(num_experts + 1, 0), wanted;
  for (int64_t i = 0; i < pairs; ++i) ++start[index[i] + 1];
  for (int64_t e = 0; e < num_experts; ++e) {
    if (start[e + 1]) wanted.push_back(e);
    start[e + 1] += start[e];
  }
  std::vector<int64_t> next(start.begin(), start.end() - 1);
  for (int64_t i = 0; i < pairs; ++i) {
    int64_t at = next[index[i]]++;
    token[at] = (int32_t)(i / top), slot[i] = (int32_t)at;
  }
  for (int64_t t = 0; shared && t < tokens; ++t) token[pairs + t] = (int32_t)t;

  const int64_t hp = panels_of(hidden) * kRows, mlps_in_all = (int64_t)wanted.size() + (shared != nullptr);
  // many tokens an expert: intermediate rows live in the task that makes and uses them
  const bool crowded = 8 * all >= kCrowd * mlps_in_all && mlps_in_all >= 4 * threads;
  const int64_t routed_rows = crowded ? 0 : pairs, own_rows = crowded || !shared ? 0 : tokens;
  const int64_t h_room = crowded ? 0 : pairs * padded(inner) + own_rows * padded(shared_inner);
  scratch.reserve(Activations::room(tokens, hidden, bits) + Scratch::room<float>(all * hp) +
                  Scratch::room<float>(h_room) + Activations::room(routed_rows, inner, bits) +
                  Activations::room(own_rows, shared_inner, bits));
  const Activations a(scratch, tokens, hidden, bits);
  float* y = scratch.take<float>(all * hp);
  float* h = scratch.take<float>(h_room);
  const Activations routed(scratch, routed_rows, inner, bits), own(scratch, own_rows, shared_inner, bits);

  in_pieces(tokens, rows_a_task(hidden), threads, [&](int64_t t) { a.fill(t, x + t * hidden); });

  // `count` of the panels of gate and up, which count in turns, from panel `from` on: rows of x -> rows of h
  auto gate_up = [&](const Mlp& m, int64_t from, int64_t count, const int32_t* row, int64_t n, float* h) {
    const int64_t ld = padded(m.inner), begin = from / 2 * kRows;
    if (bits <= 8) return k.panels(m.w + from * in.bytes, count, bits, true, a.rows(), row, n, h + begin, ld);
    const auto part = reinterpret_cast<const uint8_t* const*>(m.w);
    plain_rows(part[0] + from / 2 * in.bytes, part[1] + from / 2 * in.bytes,
               std::min(count / 2 * kRows, m.inner - begin), bits, a.rows(), row, n, h + begin, ld);
  };
  auto down = [&](const Mlp& m, int64_t from, int64_t count, const Rows& rows, int64_t n, float* to) {
    const uint8_t* w = bits <= 8 ? m.w + 2 * panels_of(m.inner) * in.bytes
                                 : reinterpret_cast<const uint8_t* const*>(m.w)[2];
    panels_into(w, Panel(m.inner, bits), from, count, bits, rows, n, {to, hp, bits <= 8 ? hp : hidden});
  };

  auto in_crowds = [&](const std::vector<Mlp>& mlps) {
    struct Crowd {
      const Mlp* mlp;
      int64_t first, count;
    };
    std::vector<Crowd> crowds;
    for (const Mlp& m : mlps)
      for (int64_t i = 0; i < m.count; i += kCrowd) crowds.push_back({&m, m.first + i, std::min(kCrowd, m.count - i)});
    auto size = [](const Crowd& c) { return c.count * c.mlp->inner; };
    std::stable_sort(crowds.begin(), crowds.end(), [&](auto& p, auto& q) { return size(p) > size(q); });
    parallel((int64_t)crowds.size(), threads, [&](int64_t i) {
      static thread_local Scratch local;
      const Crowd& c = crowds[i];
      const Mlp& m = *c.mlp;
      const int64_t wide = padded(m.inner);
      local.reserve(Scratch::room<float>(c.count * wide) + Activations::room(c.count, m.inner, bits));
      float* h = local.take<float>(c.count * wide);
      const Activations rows(local, c.count, m.inner, bits);
      gate_up(m, 0, 2 * panels_of(m.inner), token.data() + c.first, c.count, h);
      for (int64_t t = 0; t < c.count; ++t) rows.fill(t, h + t * wide);
      down(m, 0, panels_of(hidden), rows.rows(), c.count, y + c.first * hp);
    });
  };

  auto in_panels = [&](const std::vector<Mlp>& mlps) {
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
      gate_up(m, task.from, task.count, token.data() + m.first, m.count, h + m.h);
    });
    // rows of h are padded to whole blocks; what lies beyond `inner` is ignored
    in_pieces(mlps.back().row + mlps.back().count, rows_a_task(inner), threads, [&](int64_t i) {
      const Mlp& m =
          *(std::upper_bound(mlps.begin(), mlps.end(), i, [](int64_t v, const Mlp& e) { return v < e.row; }) - 1);
      const int64_t pair = m.first + i - m.row;
      const bool is_routed = pair < pairs;
      (is_routed ? routed : own)
          .fill(is_routed ? pair : pair - pairs, h + m.h + (i - m.row) * padded(m.inner));
    });
    tasks = cut([&](const Mlp&) { return panels_of(hidden); });
    parallel((int64_t)tasks.size(), threads, [&](int64_t i) {
      const Task& task = tasks[i];
      const Mlp& m = *task.mlp;
      down(m, task.from, task.count, m.first < pairs ? routed.rows(m.first) : own.rows(), m.count, y + m.first * hp);
    });
  };

  bool first = true;  // of the waves; one is all there is where all experts are in memory
  while (first || !wanted.empty()) {
    std::vector<int64_t> ready = fetch && !wanted.empty() ? fetch(wanted) : wanted;
    if (ready.empty() && !wanted.empty()) throw std::runtime_error("no expert came");
    std::vector<Mlp> mlps;
    int64_t h_at = 0, row = 0;
    auto add = [&](const uint8_t* w, int64_t i, int64_t from, int64_t count) {
      mlps.push_back({w, i, from, count, h_at, row});
      h_at += count * padded(i), row += count;
    };
    if (shared && first) add(shared, shared_inner, pairs, tokens);
    for (int64_t e : ready) add(experts[e], inner, start[e], start[e + 1] - start[e]);
    if (mlps.empty()) break;
    crowded ? in_crowds(mlps) : in_panels(mlps);
    if (ready.size() == wanted.size()) break;
    wanted.erase(std::remove_if(wanted.begin(), wanted.end(),
                                [&](int64_t e) { return std::find(ready.begin(), ready.end(), e) != ready.end(); }),
                 wanted.end());
    first = false;
  }

  in_pieces(tokens, 4, threads, [&](int64_t t) {
    static thread_local std::vector<const float*> rows;
    rows.resize(top);
    for (int64_t i = 0; i < top; ++i) rows[i] = y + slot[t * top + i] * hp;
    k.weighted_sum(rows.data(), weight + t * top, top, shared ? y + (pairs + t) * hp : nullptr, hidden,
                   out + t * hidden);
  });
}

void plain_linear(const float* x, int64_t tokens, int64_t columns, const uint8_t* w, int bits, int64_t rows, float* out,
                  int threads) {
  const Rows all{nullptr, nullptr, nullptr, 0, x, columns};
  const int64_t many = 48;
  if (tokens >= many)  // share them out
    return parallel(divide_up(tokens, many), threads, [&](int64_t task) {
      Rows part = all;
      part.x += task * many * columns;
      plain_rows(w, nullptr, rows, bits, part, nullptr, std::min(many, tokens - task * many), out + task * many * rows,
                 rows);
    });
  const int64_t piece = panels_a_task(panels_of(rows), pieces_of(tokens) * threads) * kRows;
  parallel(divide_up(rows, piece), threads, [&](int64_t task) {
    const int64_t r = task * piece;
    plain_rows(w + r * columns * bits / 8, nullptr, std::min(piece, rows - r), bits, all, nullptr, tokens, out + r, rows);
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

void rms_norm(const float* x, int64_t tokens, int64_t width, int64_t stride, const float* w, float eps, float* out,
              int threads) {
  in_pieces(tokens, std::max<int64_t>(1, 16384 / width), threads,
            [&](int64_t t) { kernels().rms_norm(x + t * stride, w, width, eps, out + t * width); });
}

}  // namespace deepseek
