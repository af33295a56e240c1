// The training operations by other numbers of threads.
#include "../../csrc/training.h"

#include <vector>

#include "check.h"

namespace deepseek {
namespace {

// Numbers of one kind, in memory as the kernels read them.
struct Numbers {
  Exact<uint8_t> bytes;
  Kind kind;
  Numbers(int64_t count, Kind kind) : bytes(count * bytes_of(kind), bytes_of(kind)), kind(kind) {
    for (int64_t i = 0; i < count; ++i) {
      const float x = normal();
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      if (kind == kBf16) bits >>= 16;
      std::memcpy(bytes.get() + i * bytes_of(kind), &bits, bytes_of(kind));
    }
  }
  void* get() { return bytes.get(); }
};

}  // namespace

// Results of the training operations, of either kind, one after the other in one array of floats.
void test_training(bool units) {
  use_bf16_units(units);
  for (Kind kind : {kFloat, kBf16}) {
    if (units && kind == kFloat) continue;
    for (bool a_transposed : {false, true})
      for (bool b_transposed : {false, true})
        for (int64_t inner : {0, 1, 70, 200}) {
          const int64_t rows = 1 + below(130), columns = 1 + below(420);
          Numbers a(rows * inner, kind), b(inner * columns, kind);
          on_threads("product", rows * columns, [&](float* out, int threads) {
            product({a.get(), a_transposed ? rows : inner, kind}, a_transposed,
                    {b.get(), b_transposed ? inner : columns, kind}, b_transposed, rows, columns, inner, out, columns,
                    kind, false, threads);
          });
        }
    for (int64_t tokens : {1, 9, 150}) {
      const int64_t hidden = 40, inner = 24, top = 2, experts = 5, pairs = tokens * top, wide = 2 * inner;
      Exact<int64_t> token(pairs), ends(experts), slot(pairs);
      std::vector<std::vector<int64_t>> visits(experts);  // the last expert stays empty
      for (int64_t i = 0; i < pairs; ++i) visits[(i % top + 2 * below(2)) % (experts - 1)].push_back(i);
      int64_t at_pair = 0;
      for (int64_t e = 0; e < experts; ++e) {
        for (int64_t i : visits[e]) token[at_pair] = i / top, slot[i] = at_pair++;
        ends[e] = at_pair;
      }
      Exact<float> weight(pairs);
      weight.fill(normal);
      Numbers x(tokens * hidden, kind), w_in(experts * wide * hidden, kFloat), w_out(experts * hidden * inner, kFloat);
      Numbers dout(tokens * hidden, kind);
      const Experts layer{tokens,  hidden,      top,         pairs,      experts,
                          inner,   token.get(), ends.get(),  slot.get(), weight.get(),
                          x.get(), w_in.get(),  w_out.get(), kind,       kind == kBf16 ? kRounded : kFloat};
      Numbers both(pairs * wide, kind);
      on_threads("experts_forward", tokens * hidden + pairs * wide,
                 [&](float* out, int threads) { experts_forward(layer, out + tokens * hidden, out, threads); });
      const int64_t sizes[] = {tokens * hidden, pairs, experts * wide * hidden, experts * hidden * inner};
      on_threads("experts_backward", sizes[0] + sizes[1] + sizes[2] + sizes[3], [&](float* out, int threads) {
        float *d_weight = out + sizes[0], *d_in = d_weight + sizes[1], *d_out = d_in + sizes[2];
        experts_backward(layer, both.get(), dout.get(), out, d_weight, d_in, d_out, threads);
      });
    }
    for (int64_t length : {1, 17, 130}) {
      const int64_t batch = 2, heads = 3, width = 20, value = 12, n = batch * heads * length;
      Numbers q(n * width, kind), k(n * width, kind), v(n * value, kind), dout(n * value, kind);
      auto lies = [&](void* data, int64_t w) { return Heads{data, length * heads * w, w, heads * w, w}; };
      Numbers probs(n * length, kind);
      on_threads("attention_forward", n * value, [&](float* out, int threads) {
        attention_forward(lies(q.get(), width), lies(k.get(), width), lies(v.get(), value), lies(out, value), kind,
                          batch, heads, length, 0.3f, probs.get(), threads);
      });
      on_threads("attention_backward", 2 * n * width + n * value, [&](float* out, int threads) {
        attention_backward(lies(q.get(), width), lies(k.get(), width), lies(v.get(), value), lies(dout.get(), value),
                           lies(out, width), lies(out + n * width, width), lies(out + 2 * n * width, value), kind,
                           batch, heads, length, 0.3f, probs.get(), threads);
      });
    }
    const int64_t rows = 70, hidden = 40, vocab = 90;
    Numbers x(rows * hidden, kind), w(vocab * hidden, kFloat);
    Exact<int64_t> label(rows);
    label.fill([&] { return below(vocab + 9) - 9; });
    on_threads("head_loss", rows + rows * hidden + vocab * hidden, [&](float* out, int threads) {
      head_loss(x.get(), kind, w.get(), kind == kBf16 ? kRounded : kFloat, label.get(), rows, hidden, vocab, 0.1f, 32,
                out, out + rows, out + rows + rows * hidden, threads);
    });
    Exact<float> by(hidden), r(rows), parts((rows + 63) / 64 * hidden);
    by.fill(normal);
    Numbers dy(rows * hidden, kind);
    on_threads("norm_forward", rows * hidden, [&](float* out, int threads) {
      norm_forward(x.get(), kind, by.get(), rows, hidden, 1e-6f, out, r.get(), threads);
    });
    on_threads("norm_backward", rows * hidden + hidden, [&](float* out, int threads) {
      norm_backward(x.get(), dy.get(), kind, by.get(), r.get(), rows, hidden, out, parts.get(), out + rows * hidden,
                    threads);
    });
    Numbers turned(rows * 2 * 22, kind);
    Exact<float> angles(rows * 11);
    angles.fill(normal);
    const Heads in{turned.get(), 0, 22, 44, 22};
    for (bool interleaved : {false, true})
      for (bool back : {false, true})
        on_threads("rotate", rows * 44, [&](float* out, int threads) {
          rotate(in, {out, 0, 22, 44, 22}, kind, angles.get(), angles.get(), 0, 11, 1, 2, rows, interleaved, back,
                 threads);
        });
    const int64_t count = 40001;
    Numbers gate(count, kind), up(count, kind), dh(count, kind);
    on_threads("swiglu_forward", count,
               [&](float* out, int threads) { swiglu_forward(gate.get(), up.get(), kind, count, out, threads); });
    on_threads("swiglu_backward", 2 * count, [&](float* out, int threads) {
      swiglu_backward(dh.get(), gate.get(), up.get(), kind, count, out, out + count, threads);
    });
  }
}

}  // namespace deepseek
