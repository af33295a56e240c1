#include "training.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "scratch.h"

namespace deepseek {
namespace {

constexpr int64_t kBlockStrips = 8,
                  kBlockRows = 112;  // of the left factor: they meet a block of the right in the cache

const TrainingKernels& table() { return training_kernels(); }

void* at(const void* p, int64_t element, Kind kind) {
  return const_cast<char*>(static_cast<const char*>(p)) + element * bytes_of(kind);
}

// How factors of these kinds are multiplied: on BF16 units where both are of BF16 and there are any.
const Products& products_of(Kind a, Kind b) {
  const Products* units = a == kFloat || b == kFloat ? nullptr : bf16_products();
  return units ? *units : table().products;
}

// Rows of the left factor that are taken at a time.
int64_t unit_of(const Products& p) { return std::min(kBlockStrips, divide_up(kBlockRows, p.rows)) * p.rows; }

// What lies in FP32 between two products on the units of `p`, as the second one takes it.
Kind between(const Products& p) { return &p == &table().products ? kFloat : kRounded; }
// The same, where it is stored for the second product alone.
Kind stored(const Products& p) { return &p == &table().products ? kFloat : kBf16; }

// A right factor [inner][columns] in memory for its panels: by blocks of its depth, in each by blocks of kColumns.
struct Factor {
  const Products& by;
  char* data;
  int64_t inner, columns, wide;
  Factor(const Products& by, char* data, int64_t inner, int64_t columns)
      : by(by), data(data), inner(inner), columns(columns), wide(divide_up(columns, by.columns) * by.columns) {}
  static int64_t room(const Products& by, int64_t inner, int64_t columns) {
    return divide_up(columns, by.columns) * by.columns * divide_up(inner, by.together) * by.together * by.bytes;
  }
  int64_t depth(int64_t k) const { return std::min(by.depth, inner - k / by.depth * by.depth); }
  int64_t panel(int64_t k) const { return divide_up(depth(k), by.together) * by.together * by.columns * by.bytes; }
  // Panels of the block that k lies in, from column n on (a multiple of the tile's).
  char* panels(int64_t k, int64_t n) const {
    return data + k / by.depth * by.depth * wide * by.bytes + n / by.columns * panel(k);
  }
  void pack(const Matrix& b, bool transposed, int64_t k, int64_t n) const {
    by.pack_right(b, transposed, k, depth(k), n, std::min(kColumns, columns - n), panels(k, n));
  }
  void pack(const Matrix& b, bool transposed) const {
    for (int64_t k = 0; k < inner; k += by.depth)
      for (int64_t n = 0; n < columns; n += kColumns) pack(b, transposed, k, n);
  }
};

// out [rows][ld] FP32 (+)= rows first_row … of a, inner columns from_k to to_k, times columns n … of b. One thread.
// from_k is even, and so is to_k where it is not the end; on tiles both are multiples of `together`.
void block(const Matrix& a, bool transposed, int64_t first_row, int64_t rows, int64_t from_k, int64_t to_k,
           const Factor& b, int64_t n, int64_t columns, float* out, int64_t ld, bool add) {
  static thread_local Scratch buffer;
  const Products& p = b.by;
  const int64_t unit = unit_of(p);
  for (int64_t done = 0; done < rows; done += unit) {
    int64_t some = std::min(unit, rows - done);
    bool more = add;
    for (int64_t k = from_k; k < to_k; more = true) {
      int64_t start = k / p.depth * p.depth, end = std::min(to_k, start + b.depth(k));
      char* packed = buffer.only<char>(divide_up(some, p.rows) * p.strip);
      p.pack_left(a, transposed, first_row + done, some, k, end - k, packed);
      for (int64_t c = 0; c < columns; c += kColumns) {
        const char* panels = b.panels(k, n + c) + (k - start) * p.columns * p.bytes;
        for (int64_t r = 0; r < some; r += p.rows)
          p.multiply(packed + r / p.rows * p.strip, transposed, std::min(p.rows, some - r), panels, b.panel(k), end - k,
                     std::min(kColumns, columns - c), out + (done + r) * ld + c, ld, more);
      }
      k = end;
    }
  }
}

// The same in any kind; BF16 goes through a block of FP32.
void block_into(const Matrix& a, bool transposed, int64_t first_row, int64_t rows, const Factor& b, int64_t n,
                int64_t columns, void* out, int64_t ld, Kind kind, bool add) {
  if (kind == kFloat)
    return block(a, transposed, first_row, rows, 0, b.inner, b, n, columns, static_cast<float*>(out), ld, add);
  static thread_local Scratch buffer;
  int64_t step = unit_of(b.by);
  float* wide = buffer.only(std::min(rows, step) * columns);
  for (int64_t done = 0; done < rows; done += step) {
    int64_t some = std::min(step, rows - done);
    block(a, transposed, first_row + done, some, 0, b.inner, b, n, columns, wide, columns, false);
    for (int64_t r = 0; r < some; ++r)
      table().scaled(wide + r * columns, columns, 1.0f, at(out, (done + r) * ld, kind), kind);
  }
}

void zero_rows(void* out, int64_t rows, int64_t columns, int64_t ld, Kind kind) {
  for (int64_t r = 0; r < rows; ++r) std::memset(at(out, r * ld, kind), 0, columns * bytes_of(kind));
}

void pack_all(const Factor& f, const Matrix& b, bool transposed, int threads) {
  int64_t across = divide_up(f.columns, kColumns);
  parallel(divide_up(f.inner, f.by.depth) * across, threads,
           [&](int64_t i) { f.pack(b, transposed, i / across * f.by.depth, i % across * kColumns); });
}

// As `product`, with the right factor packed.
void product_of(const Matrix& a, bool transposed, const Factor& b, int64_t rows, void* out, int64_t ld, Kind kind,
                bool add, int threads) {
  int64_t strips = divide_up(rows, b.by.rows), pieces = divide_up(rows, unit_of(b.by));
  pieces = std::min(strips, divide_up(pieces, threads) * threads);
  // columns in as few parts as there are tasks enough: every part packs the left factor again
  int64_t across = divide_up(b.columns, kColumns);
  int64_t parts = std::min(across, divide_up(8 * threads, std::max<int64_t>(pieces, 1)));
  parallel(pieces * parts, threads, [&](int64_t i) {
    int64_t piece = i % pieces, n = across * (i / pieces) / parts * kColumns;
    int64_t end = std::min(b.columns, across * (i / pieces + 1) / parts * kColumns);
    int64_t first = strips * piece / pieces * b.by.rows;
    int64_t last = std::min(rows, strips * (piece + 1) / pieces * b.by.rows);
    block_into(a, transposed, first, last - first, b, n, end - n, at(out, first * ld + n, kind), ld, kind, add);
  });
}

thread_local Scratch right_buffer,
    call_buffer;  // of the calling thread: a packed factor; one operation's intermediates

int64_t begin_of(const Experts& e, int64_t i) { return i ? e.ends[i - 1] : 0; }

// Pieces of rows that belong to one expert: enough of them to share, few enough to pack its weights seldom.
struct Piece {
  int64_t expert, first, rows;
};
std::vector<Piece> pieces_of(const Experts& e, int64_t unit, int threads) {
  int64_t most = std::clamp(e.pairs / (4 * threads) / unit, int64_t{1}, int64_t{5}) * unit;
  std::vector<Piece> pieces;
  for (int64_t i = 0; i < e.experts; ++i)
    for (int64_t r = begin_of(e, i); r < e.ends[i]; r += most) pieces.push_back({i, r, std::min(most, e.ends[i] - r)});
  return pieces;
}

// out[t] = sum of the token's rows of y, in the order of the experts; zeros where it has none.
void combine(const Experts& e, const float* y, void* out, int threads) {
  constexpr int64_t kTokens = 32;
  parallel(divide_up(e.tokens, kTokens), threads, [&](int64_t i) {
    static thread_local std::vector<const float*> rows;
    rows.resize(e.top);
    for (int64_t t = i * kTokens; t < std::min(e.tokens, (i + 1) * kTokens); ++t) {
      int64_t count = 0;
      for (int64_t k = 0; k < e.top; ++k)
        if (int64_t slot = e.slot[t * e.top + k]; slot >= 0) rows[count++] = y + slot * e.hidden;
      void* sum = at(out, t * e.hidden, e.kind);
      if (count == 0) {
        zero_rows(sum, 1, e.hidden, e.hidden, e.kind);
        continue;
      }
      std::sort(rows.begin(), rows.begin() + count);
      table().sum_rows(rows.data(), count, e.hidden, sum, e.kind);
    }
  });
}

Matrix head_of(const Heads& h, int64_t b, int64_t n, Kind kind) {
  return {at(h.data, b * h.batch_step + n * h.head_step, kind), h.row_step, kind};
}

}  // namespace

void product(const Matrix& a, bool a_transposed, const Matrix& b, bool b_transposed, int64_t rows, int64_t columns,
             int64_t inner, void* out, int64_t ld, Kind out_kind, bool add, int threads) {
  if (inner == 0) {
    if (!add) zero_rows(out, rows, columns, ld, out_kind);
    return;
  }
  const Products& by = products_of(a.kind, b.kind);
  Factor f(by, right_buffer.only<char>(Factor::room(by, inner, columns)), inner, columns);
  pack_all(f, b, b_transposed, threads);
  product_of(a, a_transposed, f, rows, out, ld, out_kind, add, threads);
}

void experts_forward(const Experts& e, void* both, void* out, int threads) {
  const TrainingKernels& t = table();
  const Products& by = products_of(e.kind, e.w_kind);
  const Kind mid = stored(by);
  int64_t wide = 2 * e.inner, unit = unit_of(by);
  std::vector<Piece> pieces = pieces_of(e, unit, threads);
  float* y = call_buffer.only(e.pairs * e.hidden);
  parallel(pieces.size(), threads, [&](int64_t i) {
    static thread_local Scratch weights, between;
    const Piece& p = pieces[i];
    char* packed = weights.only<char>(std::max(Factor::room(by, e.hidden, wide), Factor::room(by, e.inner, e.hidden)));
    float* gate_up = between.only(unit * wide + p.rows * e.inner);
    float* h = gate_up + unit * wide;  // of kind `mid`
    Factor in(by, packed, e.hidden, wide), down(by, packed, e.inner, e.hidden);
    in.pack({at(e.w_in, p.expert * wide * e.hidden, e.w_kind), e.hidden, e.w_kind}, true);
    for (int64_t done = 0; done < p.rows; done += unit) {
      int64_t first = p.first + done, some = std::min(unit, p.rows - done);
      block({e.x, e.hidden, e.kind, e.token + first}, false, 0, some, 0, e.hidden, in, 0, wide, gate_up, wide, false);
      if (both) t.scaled(gate_up, some * wide, 1.0f, at(both, first * wide, e.kind), e.kind);
      for (int64_t r = 0; r < some; ++r)
        t.gated(gate_up + r * wide, gate_up + r * wide + e.inner, kFloat, e.weight[first + r], e.inner,
                at(h, (done + r) * e.inner, mid), mid);
    }
    down.pack({at(e.w_out, p.expert * e.hidden * e.inner, e.w_kind), e.inner, e.w_kind}, true);
    block({h, e.inner, mid}, false, 0, p.rows, 0, e.inner, down, 0, e.hidden, y + p.first * e.hidden, e.hidden, false);
  });
  combine(e, y, out, threads);
}

void experts_backward(const Experts& e, const void* both, const void* dout, void* dx, float* d_weight, void* d_in,
                      void* d_out, int threads) {
  const TrainingKernels& t = table();
  const Products& by = products_of(e.kind, e.w_kind);
  const Kind mid = stored(by);
  int64_t wide = 2 * e.inner, unit = unit_of(by);
  std::vector<Piece> pieces = pieces_of(e, unit, threads);
  float* y = call_buffer.only(e.pairs * (e.hidden + e.inner + wide));  // an expert's rows of dx
  float* hw = y + e.pairs * e.hidden;  // its activations times the gate's weight, and their gradients: of kind `mid`
  float* d_both = hw + e.pairs * e.inner;
  parallel(pieces.size(), threads, [&](int64_t i) {
    static thread_local Scratch weights, between;
    const Piece& p = pieces[i];
    char* packed = weights.only<char>(std::max(Factor::room(by, e.hidden, e.inner), Factor::room(by, wide, e.hidden)));
    float* dh = between.only(unit * e.inner);
    Factor up(by, packed, e.hidden, e.inner), in(by, packed, wide, e.hidden);
    up.pack({at(e.w_out, p.expert * e.hidden * e.inner, e.w_kind), e.inner, e.w_kind}, false);
    for (int64_t done = 0; done < p.rows; done += unit) {
      int64_t first = p.first + done, some = std::min(unit, p.rows - done);
      block({dout, e.hidden, e.kind, e.token + first}, false, 0, some, 0, e.hidden, up, 0, e.inner, dh, e.inner, false);
      for (int64_t r = 0; r < some; ++r) {
        int64_t pair = first + r;
        float dot =
            t.gated_back(dh + r * e.inner, at(both, pair * wide, e.kind), at(both, pair * wide + e.inner, e.kind),
                         e.kind, kFloat, e.weight[pair], e.inner, at(d_both, pair * wide, mid),
                         at(d_both, pair * wide + e.inner, mid), mid, at(hw, pair * e.inner, mid));
        if (d_weight) d_weight[pair] = dot;
      }
    }
    if (!dx) return;
    in.pack({at(e.w_in, p.expert * wide * e.hidden, e.w_kind), e.hidden, e.w_kind}, false);
    block({at(d_both, p.first * wide, mid), wide, mid}, false, 0, p.rows, 0, wide, in, 0, e.hidden,
          y + p.first * e.hidden, e.hidden, false);
  });
  if (dx) combine(e, y, dx, threads);
  Kind w_out_kind = e.w_kind == kBf16 ? kBf16 : kFloat;
  parallel(2 * e.experts, threads, [&](int64_t i) {
    static thread_local Scratch factor;
    int64_t expert = i / 2, first = begin_of(e, expert), count = e.ends[expert] - first;
    int64_t rows = i % 2 ? wide : e.hidden, columns = i % 2 ? e.hidden : e.inner;
    void* out = i % 2 ? d_in : d_out;
    if (!out) return;
    out = at(out, expert * rows * columns, w_out_kind);
    if (count == 0) return zero_rows(out, rows, columns, columns, w_out_kind);
    Factor f(by, factor.only<char>(Factor::room(by, count, columns)), count, columns);
    Matrix x{e.x, e.hidden, e.kind, e.token + first}, dy{dout, e.hidden, e.kind, e.token + first};
    Matrix d{at(d_both, first * wide, mid), wide, mid}, h{at(hw, first * e.inner, mid), e.inner, mid};
    f.pack(i % 2 ? x : h, false);
    block_into(i % 2 ? d : dy, true, 0, rows, f, 0, columns, out, columns, w_out_kind, false);
  });
}

void attention_forward(const Heads& q, const Heads& k, const Heads& v, const Heads& out, Kind kind, int64_t batch,
                       int64_t heads, int64_t length, float scale, void* probs, int threads) {
  const TrainingKernels& t = table();
  const Products& by = products_of(kind, kind);
  int64_t unit = unit_of(by);
  parallel(batch * heads, threads, [&](int64_t i) {
    static thread_local Scratch buffer;
    int64_t b = i / heads, n = i % heads;
    int64_t k_room = Factor::room(by, k.width, length), v_room = Factor::room(by, length, v.width);
    buffer.reserve(k_room + v_room + Scratch::room<float>(unit * length) + Scratch::room<float>(unit * v.width));
    Factor key(by, buffer.take<char>(k_room), k.width, length), value(by, buffer.take<char>(v_room), length, v.width);
    float *scores = buffer.take<float>(unit * length), *sums = buffer.take<float>(unit * v.width);
    key.pack(head_of(k, b, n, kind), true);
    value.pack(head_of(v, b, n, kind), false);
    void* saved = at(probs, i * length * length, kind);
    for (int64_t lo = 0; lo < length; lo += unit) {
      int64_t some = std::min(unit, length - lo), hi = lo + some;
      block(head_of(q, b, n, kind), false, lo, some, 0, q.width, key, 0, hi, scores, length, false);
      for (int64_t r = 0; r < some; ++r)
        t.softmax(scores + r * length, scale, lo + r + 1, length, at(saved, (lo + r) * length, kind), kind);
      block({at(saved, lo * length, kind), length, kind}, false, 0, some, 0, hi, value, 0, v.width, sums, v.width,
            false);
      for (int64_t r = 0; r < some; ++r)
        t.scaled(sums + r * v.width, v.width, 1.0f,
                 at(out.data, b * out.batch_step + n * out.head_step + (lo + r) * out.row_step, kind), kind);
    }
  });
}

void attention_backward(const Heads& q, const Heads& k, const Heads& v, const Heads& dout, const Heads& dq,
                        const Heads& dk, const Heads& dv, Kind kind, int64_t batch, int64_t heads, int64_t length,
                        float scale, const void* probs, int threads) {
  const TrainingKernels& t = table();
  const Products& by = products_of(kind, kind);
  int64_t unit = unit_of(by);
  parallel(batch * heads, threads, [&](int64_t i) {
    static thread_local Scratch buffer;
    int64_t b = i / heads, n = i % heads;
    const int64_t width = std::max(k.width, v.width);
    int64_t room = std::max(Factor::room(by, v.width, length), Factor::room(by, length, width));
    buffer.reserve(Scratch::room<float>(length * length) + Scratch::room<float>(unit * width) + room);
    float *ds = buffer.take<float>(length * length), *sums = buffer.take<float>(unit * width);
    char* packed = buffer.take<char>(room);
    Matrix p{at(probs, i * length * length, kind), length, kind}, scores{ds, length, between(by)};
    Factor value(by, packed, v.width, length), key(by, packed, length, k.width), up(by, packed, length, v.width);
    auto deliver = [&](const Heads& to, int64_t lo, int64_t some, float by) {
      for (int64_t r = 0; r < some; ++r)
        t.scaled(sums + r * to.width, to.width, by,
                 at(to.data, b * to.batch_step + n * to.head_step + (lo + r) * to.row_step, kind), kind);
    };
    auto blocks = [&](const auto& work) {
      for (int64_t lo = 0; lo < length; lo += unit) work(lo, std::min(unit, length - lo));
    };
    value.pack(head_of(v, b, n, kind), true);
    blocks([&](int64_t lo, int64_t some) {
      block(head_of(dout, b, n, kind), false, lo, some, 0, v.width, value, 0, lo + some, ds + lo * length, length,
            false);
      for (int64_t r = lo; r < lo + some; ++r)
        t.softmax_back(at(p.data, r * length, kind), kind, ds + r * length, r + 1, length);
    });
    key.pack(head_of(k, b, n, kind), false);
    blocks([&](int64_t lo, int64_t some) {
      block(scores, false, lo, some, 0, lo + some, key, 0, k.width, sums, k.width, false);
      deliver(dq, lo, some, scale);
    });
    key.pack(head_of(q, b, n, kind), false);
    blocks([&](int64_t lo, int64_t some) {
      block(scores, true, lo, some, lo, length, key, 0, k.width, sums, k.width, false);
      deliver(dk, lo, some, scale);
    });
    up.pack(head_of(dout, b, n, kind), false);
    blocks([&](int64_t lo, int64_t some) {
      block(p, true, lo, some, lo, length, up, 0, v.width, sums, v.width, false);
      deliver(dv, lo, some, 1.0f);
    });
  });
}

void head_loss(const void* x, Kind kind, const void* w, Kind w_kind, const int64_t* label, int64_t rows, int64_t hidden,
               int64_t vocab, float scale, int64_t chunk, float* loss, float* dx, float* dw, int threads) {
  static thread_local Scratch forward, backward;
  float* logits = call_buffer.only(chunk * vocab);
  Matrix weights{w, hidden, w_kind};
  const Products& by = products_of(kind, w_kind);
  const Kind mid = stored(by);
  Factor up(by, forward.only<char>(Factor::room(by, hidden, vocab)), hidden, vocab), down(by, nullptr, vocab, hidden);
  pack_all(up, weights, true, threads);
  if (dx) {
    down.data = backward.only<char>(Factor::room(by, vocab, hidden));
    pack_all(down, weights, false, threads);
  }
  for (int64_t done = 0; done < rows; done += chunk) {
    int64_t some = std::min(chunk, rows - done);
    Matrix part{at(x, done * hidden, kind), hidden, kind};
    Matrix gradient{logits, mid == kBf16 ? 2 * vocab : vocab, mid};  // each row where its logits were
    product_of(part, false, up, some, logits, vocab, kFloat, false, threads);
    parallel(some, threads, [&](int64_t r) {
      int64_t to = label[done + r];
      float each = table().cross_entropy(logits + r * vocab, vocab, std::max<int64_t>(to, 0), to < 0 ? 0.0f : scale,
                                         dx || dw, mid);
      loss[done + r] = to < 0 ? 0.0f : each;
    });
    if (dx) product_of(gradient, false, down, some, dx + done * hidden, hidden, kFloat, false, threads);
    if (dw) product(gradient, true, part, false, vocab, hidden, some, dw, hidden, kFloat, done > 0, threads);
  }
}

void norm_forward(const void* x, Kind kind, const float* w, int64_t rows, int64_t width, float eps, void* y, float* r,
                  int threads) {
  constexpr int64_t kSome = 64;
  parallel(divide_up(rows, kSome), threads, [&](int64_t i) {
    for (int64_t m = i * kSome; m < std::min(rows, (i + 1) * kSome); ++m)
      r[m] = table().norm(at(x, m * width, kind), kind, w, width, eps, at(y, m * width, kind));
  });
}

void norm_backward(const void* x, const void* dy, Kind kind, const float* w, const float* r, int64_t rows,
                   int64_t width, void* dx, float* parts, float* dw, int threads) {
  constexpr int64_t kSome = 64;
  int64_t count = divide_up(rows, kSome);
  parallel(count, threads, [&](int64_t i) {
    float* part = parts + i * width;
    std::memset(part, 0, 4 * width);
    for (int64_t m = i * kSome; m < std::min(rows, (i + 1) * kSome); ++m)
      table().norm_back(at(x, m * width, kind), at(dy, m * width, kind), kind, w, r[m], width, at(dx, m * width, kind),
                        part);
  });
  std::vector<const float*> each(count);
  for (int64_t i = 0; i < count; ++i) each[i] = parts + i * width;
  table().sum_rows(each.data(), count, width, dw, kFloat);
}

void rotate(const Heads& x, const Heads& out, Kind kind, const float* cos, const float* sin, int64_t batch_step,
            int64_t row_step, int64_t batch, int64_t heads, int64_t length, bool interleaved, bool back, int threads) {
  in_pieces(batch * length, 16, threads, [&](int64_t i) {
    const int64_t b = i / length, r = i % length, from = b * batch_step + r * row_step;
    auto row = [&](const Heads& h, int64_t n) {
      return at(h.data, b * h.batch_step + n * h.head_step + r * h.row_step, kind);
    };
    for (int64_t n = 0; n < heads; ++n)
      table().rotate(row(x, n), kind, cos + from, sin + from, x.width / 2, interleaved, back, row(out, n));
  });
}

namespace {
constexpr int64_t kPiece = 16384;  // numbers a task of an element-wise pass
}

void swiglu_forward(const void* gate, const void* up, Kind kind, int64_t count, void* h, int threads) {
  parallel(divide_up(count, kPiece), threads, [&](int64_t i) {
    int64_t from = i * kPiece, n = std::min(kPiece, count - from);
    table().gated(at(gate, from, kind), at(up, from, kind), kind, 1.0f, n, at(h, from, kind), kind);
  });
}

void swiglu_backward(const void* dh, const void* gate, const void* up, Kind kind, int64_t count, void* d_gate,
                     void* d_up, int threads) {
  parallel(divide_up(count, kPiece), threads, [&](int64_t i) {
    int64_t from = i * kPiece, n = std::min(kPiece, count - from);
    table().gated_back(at(dh, from, kind), at(gate, from, kind), at(up, from, kind), kind, kind, 1.0f, n,
                       at(d_gate, from, kind), at(d_up, from, kind), kind, nullptr);
  });
}

}  // namespace deepseek
