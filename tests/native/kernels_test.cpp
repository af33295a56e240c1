// Every table of kernels against the scalar one, and the operations against themselves on other numbers of threads. Built
// with sanitizers (`make sanitize`).
#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "../../csrc/attention.h"
#include "../../csrc/low_rank.h"
#include "../../csrc/quantized.h"
#include "../../csrc/training.h"
#include "check.h"

using namespace deepseek;

namespace {

// A matrix of panels with any codes and scales, and steps of ordinary size.
void random_panels(uint8_t* w, int64_t count, const Panel& shape, int bits) {
  for (int64_t i = 0; i < count * shape.bytes; ++i) {
    w[i] = (uint8_t)generator();
    if (bits == 8 && w[i] == 128) w[i] = 129;  // no codec writes -128
  }
  for (int64_t p = 0; p < count; ++p)
    for (int r = 0; r < kRows; ++r) {
      float step = (float)(1 + below(100)) / 1e5f;
      std::memcpy(w + p * shape.bytes + 4 * r, &step, 4);
    }
}

// ---- tables --------------------------------------------------------------------------------------------------------

void test_quantize(const Kernels& table) {
  for (int64_t columns : {1, 15, 16, 17, 63, 64, 65, 100, 128, 130, 200})
    for (int repeat = 0; repeat < 20; ++repeat) {
      const int64_t blocks = blocks_of(columns);
      Exact<float> x(columns, below(2)), scale(1), want_scale(1);
      Exact<int8_t> q(blocks * kBlock, below(3)), want_q(blocks * kBlock);
      Exact<int32_t> surplus(blocks), want_surplus(blocks);
      random_row(x.get(), columns);
      table.quantize(x.get(), columns, q.get(), surplus.get(), scale.get());
      scalar_kernels->quantize(x.get(), columns, want_q.get(), want_surplus.get(), want_scale.get());
      const std::string where = at(table, {columns});
      same(q, want_q, "quantize: q", where), same(surplus, want_surplus, "quantize: surplus", where);
      same(scale, want_scale, "quantize: scale", where);
    }
}

void test_quantize_weights(const Kernels& table) {
  for (int bits : {4, 8})
    for (int64_t columns : {1, 16, 63, 64, 70, 200}) {
      const Panel shape(columns, bits);
      Exact<uint8_t> panel(shape.bytes), want(shape.bytes);
      Exact<double> squares(2), want_squares(2);
      Exact<float> w(columns, 1), room(3 * (columns + kBlock));
      for (int64_t r = 0; r < kRows; ++r) {
        w.fill(normal);
        if (r == 3) w.fill([] { return 0.0f; });
        table.quantize_weights(w.get(), columns, bits, r, panel.get(), room.get(), squares.get());
        scalar_kernels->quantize_weights(w.get(), columns, bits, r, want.get(), room.get(), want_squares.get());
      }
      same(panel, want, "quantize_weights", at(table, {bits, columns}));
      same(squares, want_squares, "quantize_weights: squares", at(table, {bits, columns}));
    }
}

void test_panels(const Kernels& table) {
  for (int bits : {4, 8})
    for (int64_t columns : {64, 128, 320, 448})
      for (int64_t count : {1, 2, 3, 6})
        for (int64_t tokens : {1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 33, 96, 97, 130}) {
          if (count * tokens > 300 || columns * tokens > 20000) continue;
          const Panel shape(columns, bits);
          Exact<uint8_t> w(count * shape.bytes);
          random_panels(w.get(), count, shape, bits);
          const int64_t known = tokens + below(3);
          Exact<float> x(columns), scale(known);
          Exact<int8_t> q(known * pitch_of(shape.blocks), below(4));
          Exact<int32_t> surplus(known * shape.blocks), row(tokens);
          for (int64_t t = 0; t < known; ++t) {
            random_row(x.get(), columns);
            scalar_kernels->quantize(x.get(), columns, &q[t * pitch_of(shape.blocks)], &surplus[t * shape.blocks],
                                     &scale[t]);
          }
          row.fill([&] { return (int32_t)below(known); });
          const Rows rows{q.get(), surplus.get(), scale.get(), shape.blocks};
          for (bool gated : {false, true})
            for (bool chosen : {false, true}) {
              if (gated && count % 2) continue;
              const int64_t width = count * kRows / (gated ? 2 : 1), ld = width + below(2) * 5;
              Exact<float> out((tokens - 1) * ld + width, below(2)), want((tokens - 1) * ld + width);
              table.panels(w.get(), count, bits, gated, rows, chosen ? row.get() : nullptr, tokens, out.get(), ld);
              scalar_kernels->panels(w.get(), count, bits, gated, rows, chosen ? row.get() : nullptr, tokens,
                                     want.get(), ld);
              same(out, want, "panels", at(table, {bits, columns, count, tokens, gated, chosen}));
            }
        }
}

// Plain weights of 16 or 32 bits.
void random_plain(uint8_t* w, int64_t count, int bits) {
  for (int64_t i = 0; i < count; ++i) {
    const float x = normal();
    std::memcpy(w + i * bits / 8, (const char*)&x + (bits == 16 ? 2 : 0), bits / 8);
  }
}

void test_plain_rows(const Kernels& table) {
  for (int64_t columns : {1, 4, 16, 36, 64, 113, 200})
    for (int64_t rows : {1, 15, 16, 50})
      for (int64_t tokens : {1, 3, 4, 9})
        for (bool gated : {false, true})
          for (bool chosen : {false, true}) {
            const int64_t known = tokens + below(3), ld = rows + below(3);
            Exact<float> x(known * columns, 1);
            Exact<uint8_t> w16(rows * columns * 2, 2), up16(w16.size()), w32(rows * columns * 4, 4), up32(w32.size());
            x.fill(normal);
            for (auto* w : {&w16, &up16}) random_plain(w->get(), rows * columns, 16);
            for (auto* w : {&w32, &up32}) random_plain(w->get(), rows * columns, 32);
            Exact<int32_t> row(tokens);
            row.fill([&] { return (int32_t)below(known); });
            const Rows rows_of_x{nullptr, nullptr, nullptr, 0, x.get(), columns};
            Exact<float> out((tokens - 1) * ld + rows, 1), want(out.size());
            auto run = [&](const Kernels& k, int bits, float* to) {
              const int32_t* which = chosen ? row.get() : nullptr;
              if (bits == 16)
                k.bf16_rows((uint16_t*)w16.get(), gated ? (uint16_t*)up16.get() : nullptr, rows, rows_of_x, which,
                            tokens, to, ld);
              else
                k.fp32_rows((float*)w32.get(), gated ? (float*)up32.get() : nullptr, rows, rows_of_x, which, tokens, to,
                            ld);
            };
            for (int bits : {16, 32}) {
              run(table, bits, out.get()), run(*scalar_kernels, bits, want.get());
              same(out, want, "plain rows", at(table, {bits, columns, rows, tokens, gated, chosen}));
            }
          }
}

void test_rows(const Kernels& table) {
  for (int64_t width : {1, 7, 16, 31, 64, 100, 150}) {
    Exact<float> x(width, 1), w(width, 3), out(width, 1), want(width);
    x.fill(normal), w.fill(normal);
    table.rms_norm(x.get(), w.get(), width, 1e-6f, out.get());
    scalar_kernels->rms_norm(x.get(), w.get(), width, 1e-6f, want.get());
    same(out, want, "rms_norm", at(table, {width}));
    for (int64_t count : {0, 1, 5})
      for (bool add : {false, true}) {
        Exact<float> y(count * width), weight(count);
        Exact<const float*> rows(count);
        y.fill(normal), weight.fill(normal);
        for (int64_t i = 0; i < count; ++i) rows[i] = y.get() + i * width;
        table.weighted_sum(rows.get(), weight.get(), count, add ? x.get() : nullptr, width, out.get());
        scalar_kernels->weighted_sum(rows.get(), weight.get(), count, add ? x.get() : nullptr, width, want.get());
        same(out, want, "weighted_sum", at(table, {width, count, add}));
      }
  }
}

void test_attention(const Kernels& table) {
  for (int64_t width : {16, 48})
    for (int64_t depth : {18, 56})
      for (int64_t keys : {1, 7, 8, 9, 127, 128})
        for (bool ramp : {false, true}) {
          const int64_t stride = depth + width + below(3), queries = 1 + below(3), part_size = 32 + 16 * width;
          Exact<float> q(queries * 16 * depth), key((keys - 1) * stride + depth + width, 1);
          q.fill(normal), key.fill(normal);
          Exact<float> part(queries * part_size), want_part(queries * part_size);
          Exact<const float*> at_query(queries), parts(3);
          Exact<float*> to(queries), want_to(queries);
          Exact<int64_t> count(queries);
          const int64_t first = ramp ? below(keys + 20) - 14 : std::max<int64_t>(1, keys - queries + 1);
          for (int64_t i = 0; i < queries; ++i) {
            at_query[i] = q.get() + i * 16 * depth, count[i] = ramp ? first + 16 * i : std::min(keys, first + i);
            to[i] = part.get() + i * part_size, want_to[i] = want_part.get() + i * part_size;
          }
          const Keys block{key.get(), key.get() + depth, stride, keys, depth, width};
          table.attention_block(at_query.get(), queries, block, count.get(), ramp, 0.3f, to.get());
          scalar_kernels->attention_block(at_query.get(), queries, block, count.get(), ramp, 0.3f, want_to.get());
          same(part, want_part, "attention_block", at(table, {width, depth, keys, queries, ramp}));
          for (int64_t rows : {1, 5, 16}) {
            Exact<float> other(part_size), out(rows * width), want(rows * width);
            other.fill(normal);
            parts[0] = parts[2] = to[0], parts[1] = other.get();
            table.attention_join(parts.get(), 3, width, rows, out.get(), width);
            scalar_kernels->attention_join(parts.get(), 3, width, rows, want.get(), width);
            same(out, want, "attention_join", at(table, {width, rows}));
          }
        }
}

// ---- operations ----------------------------------------------------------------------------------------------------

int64_t matrix_bytes(int64_t rows, int64_t columns, int bits) {
  return bits > 8 ? rows * columns * bits / 8 : panels_of(rows) * Panel(columns, bits).bytes;
}

void random_matrix(uint8_t* w, int64_t rows, int64_t columns, int bits) {
  if (bits > 8)
    random_plain(w, rows * columns, bits);
  else
    random_panels(w, panels_of(rows), Panel(columns, bits), bits);
}

// Sequences of `tokens` new tokens each, after `past` positions; their blocks lie apart in a cache of `size` numbers, in no
// order. Padding's rows lie before a sequence's first block, so a block is left free in front.
struct Pages {
  static constexpr int64_t each = 3;  // blocks of a sequence
  std::vector<int64_t> begin{0}, past, block_begin{0}, blocks;
  Sequences sequences;
  int64_t size;

  Pages(std::vector<int64_t> before, int64_t tokens, int64_t width) : past(std::move(before)) {
    const int64_t count = past.size();
    for (int64_t s = 0; s < count; ++s) {
      begin.push_back(begin.back() + tokens), block_begin.push_back(block_begin.back() + each);
      for (int64_t b = 0; b < each; ++b) blocks.push_back((1 + (s * each + b) * 7 % (each * count)) * kKeys * width);
    }
    size = (1 + each * count) * kKeys * width;
    sequences = {count, begin.data(), past.data(), block_begin.data(), blocks.data()};
  }
};

void test_operations() {
  for (int bits : {4, 8, 16, 32})
    for (int64_t tokens : {0, 1, 5, 8, 65}) {
      for (int64_t rows : {1, 16, 50})
        for (int64_t columns : {30, 64, 130}) {
          const int64_t groups = 1 + below(3), stride = matrix_bytes(rows, columns, bits);
          Exact<uint8_t> w(groups * stride);
          for (int64_t g = 0; g < groups; ++g) random_matrix(w.get() + g * stride, rows, columns, bits);
          Exact<float> x(tokens * groups * columns, 1);
          x.fill(normal);
          on_threads("quantized_groups", tokens * groups * rows, [&](float* out, int threads) {
            quantized_groups(x.get(), tokens, groups, columns, groups * columns, columns, w.get(), stride, rows, bits,
                             out, threads);
          });
          on_threads("quantized_linears", tokens * (rows + 16), [&](float* out, int threads) {
            const int64_t few = std::min<int64_t>(rows, 16);
            quantized_linears(x.get(), tokens, columns, {{w.get(), rows, out}, {w.get(), few, out + tokens * rows}},
                              bits, threads);
          });
        }
      const int64_t hidden = 72, inner = 40, shared_inner = 70, experts = 6;
      std::vector<std::unique_ptr<Exact<uint8_t>>> packed;
      std::vector<std::unique_ptr<Exact<const uint8_t*>>> plain;
      auto random_mlp = [&](int64_t n) -> const uint8_t* {
        const int64_t in = matrix_bytes(n, hidden, bits), out = matrix_bytes(hidden, n, bits);
        packed.push_back(std::make_unique<Exact<uint8_t>>(2 * in + out));
        uint8_t* w = packed.back()->get();
        random_matrix(w, n, hidden, bits), random_matrix(w + in, n, hidden, bits);
        random_matrix(w + 2 * in, hidden, n, bits);
        if (bits <= 8) return w;
        plain.push_back(std::make_unique<Exact<const uint8_t*>>(3));
        for (int64_t i = 0; i < 3; ++i) (*plain.back())[i] = w + i * in;
        return reinterpret_cast<const uint8_t*>(plain.back()->get());
      };
      Exact<const uint8_t*> table(experts);
      for (int64_t e = 0; e < experts; ++e) table[e] = random_mlp(inner);
      const uint8_t* shared = random_mlp(shared_inner);
      for (int64_t top : {0, 1, 3})
        for (bool with_shared : {false, true})
          for (int64_t visited : {int64_t(1), experts}) {
            Exact<float> x(tokens * hidden, 1), weight(tokens * top);
            Exact<int64_t> index(tokens * top);
            x.fill(normal), weight.fill(normal), index.fill([&] { return experts - 1 - below(visited); });
            on_threads("quantized_experts", tokens * hidden, [&](float* out, int threads) {
              quantized_experts(x.get(), tokens, hidden, index.get(), weight.get(), top, table.get(), experts, inner,
                                with_shared ? shared : nullptr, with_shared ? shared_inner : 0, bits, out, threads);
            });
          }
    }
  for (int bits : {16, 32})
    for (int64_t tokens : {0, 1, 9, 50}) {
      const int64_t columns = 37, rows = 65;
      Exact<float> x(tokens * columns);
      Exact<uint8_t> w(matrix_bytes(rows, columns, bits));
      x.fill(normal), random_matrix(w.get(), rows, columns, bits);
      on_threads("plain_linear", tokens * rows, [&](float* out, int threads) {
        plain_linear(x.get(), tokens, columns, w.get(), bits, rows, out, threads);
      });
    }
  for (int64_t tokens : {0, 1, 9, 150})
    for (int64_t rows : {5, 130, 300}) {
      const int64_t columns = 37, count = 3, ranks[] = {4, 0, 17};
      Exact<float> x(tokens * columns, 1), weight(tokens * count), y(tokens * rows);
      x.fill(normal), weight.fill([] { return below(2) ? normal() : 0.0f; }), y.fill(normal);
      std::vector<std::unique_ptr<Exact<float>>> held;
      std::vector<LowRank> adapters;
      for (int64_t rank : ranks) {
        for (int64_t width : {columns, rows}) {
          held.push_back(std::make_unique<Exact<float>>(rank * width, 1));
          held.back()->fill(normal);
        }
        adapters.push_back({held[held.size() - 2]->get(), held.back()->get(), rank});
      }
      on_threads("add_low_rank", tokens * rows, [&](float* out, int threads) {
        std::copy(y.get(), y.get() + y.size(), out);
        add_low_rank(x.get(), tokens, columns, adapters, weight.get(), rows, out, threads);
      });
    }
  for (int64_t heads : {1, 5, 20})
    for (int64_t tokens : {1, 3, 40}) {
      const int64_t batch = 3, rank = 32, rope = 6, width = rank + rope;
      const Pages pages({250, -2, 120}, tokens, width);
      Exact<float> q(batch * tokens * heads * rank), r(batch * tokens * heads * rope), cache(pages.size);
      q.fill(normal), r.fill(normal), cache.fill(normal);
      on_threads("mla_absorbed", batch * tokens * heads * rank, [&](float* out, int threads) {
        mla_absorbed(q.get(), r.get(), cache.get(), pages.sequences, heads, rank, rope, 0.2f, out, threads);
      });
      for (int64_t value : {16, 21})
        for (int bits : {4, 8, 16, 32}) {
          const int64_t nope = 12, rows = heads * (nope + value);
          Exact<uint8_t> w(matrix_bytes(rows, rank, bits));
          random_matrix(w.get(), rows, rank, bits);
          Exact<float> x(batch * tokens * heads * (nope + rope));
          x.fill(normal);
          on_threads("mla_naive", batch * tokens * heads * value, [&](float* out, int threads) {
            mla_naive(x.get(), r.get(), cache.get(), pages.sequences, heads, rank, rope, nope, value, w.get(), bits,
                      0.2f, out, threads);
          });
        }
    }
  for (bool interleaved : {false, true}) {
    const int64_t batch = 3, tokens = 5, heads = 3, nope = 7, rope = 6, rank = 20, width = rank + rope;
    const int64_t angles = batch * tokens * rope / 2;
    const Pages pages({4, 126, -2}, tokens, width);
    Exact<float> q(batch * tokens * heads * (nope + rope)), kv(batch * tokens * width), norm(rank), cos(angles),
        sin(angles), cache(pages.size);
    q.fill(normal), kv.fill(normal), norm.fill(normal), cos.fill(normal), sin.fill(normal);
    on_threads("mla_prepare", batch * tokens * heads * rope, [&](float* out, int threads) {
      mla_prepare(q.get(), kv.get(), norm.get(), 1e-6f, {cos.get(), sin.get(), interleaved}, pages.sequences, heads,
                  nope, rope, rank, out, cache.get(), threads);
    });
  }
  for (const Gate& gate :
       {Gate{16, 4, 2, 8, 2, true, true, true, 2.5f}, Gate{16, 1, 1, 16, 0, false, false, true, 1.0f},
        Gate{16, 4, 1, 4, 4, true, false, true, 1.0f}})
    for (int64_t tokens : {0, 1, 40}) {
      Exact<float> logits(tokens * gate.experts), bias(gate.experts), scores(tokens * gate.experts);
      Exact<int64_t> index(tokens * gate.top);
      logits.fill([] { return below(50) ? normal() : NAN; }), bias.fill(normal);
      on_threads("choose_experts", tokens * gate.top, [&](float* weight, int threads) {
        choose_experts(logits.get(), tokens, gate, bias.get(), scores.get(), index.get(), weight, threads);
        for (int64_t i = 0; i < index.size(); ++i)
          if (index[i] < 0 || index[i] >= gate.experts) std::abort();
      });
    }
  Exact<float> x(70 * 33), w(33);
  x.fill(normal), w.fill(normal);
  on_threads("rms_norm", 70 * 33,
             [&](float* out, int threads) { rms_norm(x.get(), 70, 33, 33, w.get(), 1e-6f, out, threads); });
  for (int bits : {4, 8}) {
    Exact<float> weights(50 * 70);
    weights.fill(normal);
    Exact<uint8_t> one(panels_of(50) * Panel(70, bits).bytes), many(one.size());
    Exact<double> squares(2);
    quantize_panels(weights.get(), 50, 70, bits, one.get(), squares.get(), 1);
    quantize_panels(weights.get(), 50, 70, bits, many.get(), squares.get(), 3);
    same(one, many, "quantize_panels", at(kernels(), {bits}));
  }
}

}  // namespace

int main() {
  for (const Kernels* table : {scalar_kernels, avx2_kernels, avx512_kernels, amx_kernels}) {
    if (!runs_here(table)) continue;
    const int64_t before = compared;
    test_quantize(*table), test_quantize_weights(*table), test_panels(*table), test_plain_rows(*table);
    test_rows(*table), test_attention(*table), test_two_bits(*table);
    std::printf("%s: %lld results as the scalar kernels have them\n", table->name, (long long)(compared - before));
  }
  test_operations();
  test_coding();
  test_training(false);
  if (bf16_units()) test_training(true);
  std::printf("operations (%s): the same on every number of threads, training too%s%s\n", kernels().name,
              bf16_units() ? ", with BF16 on " : "", bf16_units() ? bf16_units()->name : "");
}
