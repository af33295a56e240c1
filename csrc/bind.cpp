// The only file that knows Python. Pointers come as integers from ops/, which has checked shapes, types and layout.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/vector.h>

#include "attention.h"
#include "kernels.h"
#include "layer.h"
#include "low_rank.h"
#include "quantized.h"
#include "sparse.h"
#include "training.h"
#include "two_bits.h"

NB_MAKE_OPAQUE(std::vector<deepseek::Layer>)
NB_MAKE_OPAQUE(std::vector<deepseek::LayerAdapters>)

namespace nb = nanobind;
using namespace deepseek;

namespace {

template <typename T>
T* at(uintptr_t p) {
  return reinterpret_cast<T*>(p);
}

using release = nb::call_guard<nb::gil_scoped_release>;
using Steps = std::array<int64_t, 5>;  // of a Heads: address, batch step, head step, row step, width

// How an argument comes from Python.
template <typename T>
struct Argument {
  using Given = T;
  static T from(T given) { return given; }
};
template <typename T>
struct Argument<T*> {
  using Given = uintptr_t;
  static T* from(uintptr_t given) { return at<T>(given); }
};
template <>
struct Argument<Kind> {
  using Given = int;
  static Kind from(int given) { return (Kind)given; }
};
template <>
struct Argument<const Heads&> {
  using Given = const Steps&;
  static Heads from(const Steps& s) { return {at<void>((uintptr_t)s[0]), s[1], s[2], s[3], s[4]}; }
};

using Matrices = std::vector<std::array<int64_t, 3>>;  // of adapters: addresses of A and of B transposed, and the rank
std::vector<LowRank> low_ranks(const Matrices& given) {
  std::vector<LowRank> out;
  for (const auto& one : given) out.push_back({at<float>((uintptr_t)one[0]), at<float>((uintptr_t)one[1]), one[2]});
  return out;
}

// Defines a function whose arguments need nothing else.
template <typename Result, typename... Arguments>
void define(nb::module_& m, const char* name, Result (*function)(Arguments...)) {
  auto call = [function](typename Argument<Arguments>::Given... given) {
    return function(Argument<Arguments>::from(given)...);
  };
  m.def(name, call, release());
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Kernels of MoE-DR (csrc/).";
  m.def("isa", [] { return kernels().name; }, "Name of the instruction set in use.");

  nb::class_<Mla>(m, "Mla").def(
      "__init__", [](Mla* self, nb::tuple sizes, int bits, nb::tuple weights, nb::tuple vectors, float q_eps,
                     float kv_eps, float scale, uintptr_t key, bool interleaved) {
        auto size = [&](int i) { return nb::cast<int64_t>(sizes[i]); };
        auto bytes = [&](int i) { return at<uint8_t>(nb::cast<uintptr_t>(weights[i])); };
        auto vector = [&](int i) { return at<float>(nb::cast<uintptr_t>(vectors[i])); };
        new (self) Mla{size(0), size(1), size(2), size(3), size(4), size(5), size(6), bits, bytes(0), bytes(1), bytes(2),
                       bytes(3), bytes(4), vector(0), vector(1), vector(2), vector(3), vector(4), q_eps, kv_eps, scale,
                       at<uint8_t>(key), interleaved};
      });
  nb::class_<Ffn>(m, "Ffn").def(
      "__init__", [](Ffn* self, int64_t inner, int64_t shared_inner, int bits, nb::tuple gate, uintptr_t gate_weight,
                     int gate_bits, uintptr_t gate_bias, uintptr_t experts, uintptr_t shared) {
        auto size = [&](int i) { return nb::cast<int64_t>(gate[i]); };
        auto flag = [&](int i) { return nb::cast<bool>(gate[i]); };
        new (self) Ffn{inner, shared_inner, bits,
                       {size(0), size(1), size(2), size(3), (int)size(4), flag(5), flag(6), flag(7),
                        nb::cast<float>(gate[8])},
                       at<uint8_t>(gate_weight), gate_bits, at<float>(gate_bias), at<const uint8_t*>(experts),
                       at<uint8_t>(shared)};
      });
  nb::class_<Layer>(m, "Layer").def(
      "__init__", [](Layer* self, const Mla& mla, const Ffn& ffn, uintptr_t attention_norm, uintptr_t ffn_norm,
                     float eps) { new (self) Layer{mla, ffn, at<float>(attention_norm), at<float>(ffn_norm), eps}; });
  using Layers = std::vector<Layer>;
  nb::class_<Layers>(m, "Layers").def("__init__", [](Layers* self, nb::tuple layers) {
    new (self) Layers;
    for (nb::handle layer : layers) self->push_back(nb::cast<const Layer&>(layer));
  });
  using Adapters = std::vector<LayerAdapters>;
  nb::class_<Adapters>(m, "Adapters").def(
      "__init__", [](Adapters* self, const std::vector<std::array<Matrices, 4>>& layers) {
        new (self) Adapters;
        for (const auto& one : layers)
          self->push_back({low_ranks(one[0]), low_ranks(one[1]), low_ranks(one[2]), low_ranks(one[3])});
      });
  nb::class_<Residency>(m, "Residency").def(
      "__init__", [](Residency* self, nb::object fetch, nb::object prefetch) {
        auto numbers = [](const std::vector<int64_t>& v) {
          nb::list list;
          for (int64_t e : v) list.append(e);
          return list;
        };
        new (self) Residency;
        self->on_fetch = [=](int64_t moe_layer, const std::vector<int64_t>& wanted) {
          nb::gil_scoped_acquire acquire;
          return nb::cast<std::vector<int64_t>>(fetch(moe_layer, numbers(wanted)));
        };
        if (!prefetch.is_none())
          self->on_prefetch = [=](int64_t moe_layer, const std::vector<int64_t>& wanted) {
            nb::gil_scoped_acquire acquire;
            prefetch(moe_layer, numbers(wanted));
          };
      }, nb::arg("fetch"), nb::arg("prefetch").none());

  static const auto sequences = [](uintptr_t begin, uintptr_t past, uintptr_t block_begin, uintptr_t blocks, int64_t count) {
    return Sequences{count, at<int64_t>(begin), at<int64_t>(past), at<int64_t>(block_begin), at<int64_t>(blocks)};
  };
  m.def("layers_forward",
        [](const Layers& layers, uintptr_t x, uintptr_t begin, uintptr_t past, uintptr_t block_begin, uintptr_t blocks,
           int64_t count, int64_t naive, uintptr_t cos, uintptr_t sin, uintptr_t cache, int64_t layer_stride,
           uintptr_t scores, uintptr_t index, uintptr_t weight, const Residency* residency, int threads,
           const Adapters* adapters, uintptr_t adapter_weight) {
          layers_forward(layers, at<float>(x), sequences(begin, past, block_begin, blocks, count), naive, at<float>(cos),
                         at<float>(sin), at<float>(cache), layer_stride,
                         {at<float>(scores), at<int64_t>(index), at<float>(weight)}, residency,
                         adapters ? adapters->data() : nullptr, at<float>(adapter_weight), threads);
        },
        nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(),
        nb::arg("adapters").none() = nb::none(), nb::arg("adapter_weight") = 0, release());

  m.def("quantize_panels",
        [](uintptr_t w, int64_t rows, int64_t columns, int bits, uintptr_t out, int threads) {
          double squares[2];
          {
            nb::gil_scoped_release release;
            quantize_panels(at<float>(w), rows, columns, bits, at<uint8_t>(out), squares, threads);
          }
          return nb::make_tuple(squares[0], squares[1]);
        });

  m.def("quantized_linear",
        [](uintptr_t x, int64_t tokens, int64_t columns, uintptr_t w, int64_t rows, int bits, uintptr_t out, int threads) {
          quantized_linears(at<float>(x), tokens, columns, {{at<uint8_t>(w), rows, at<float>(out)}}, bits, threads);
        },
        release());

  define(m, "quantized_groups", quantized_groups);

  m.def("quantized_experts",
        [](uintptr_t x, int64_t tokens, int64_t hidden, uintptr_t index, uintptr_t weight, int64_t top,
           uintptr_t experts, int64_t num_experts, int64_t inner, uintptr_t shared, int64_t shared_inner, int bits,
           uintptr_t out, int threads, const Residency* residency, int64_t moe_layer) {
          Fetch fetch;
          if (residency)
            fetch = [=](const std::vector<int64_t>& wanted) {
              return residency->fetch(moe_layer, at<const uint8_t*>(experts), wanted);
            };
          quantized_experts(at<float>(x), tokens, hidden, at<int64_t>(index), at<float>(weight), top,
                            at<const uint8_t*>(experts), num_experts, inner, at<uint8_t>(shared), shared_inner, bits,
                            at<float>(out), threads, fetch);
        },
        nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg("residency").none() = nb::none(), nb::arg("moe_layer") = 0,
        release());

  define(m, "plain_linear", plain_linear);

  m.def("add_low_rank",
        [](uintptr_t x, int64_t tokens, int64_t columns, const Matrices& adapters, uintptr_t weight, int64_t rows,
           uintptr_t y, int threads) {
          add_low_rank(at<float>(x), tokens, columns, low_ranks(adapters), at<float>(weight), rows, at<float>(y), threads);
        },
        release());

  m.def("choose_experts",
        [](uintptr_t logits, int64_t tokens, int64_t experts, int64_t groups, int64_t kept_groups, int64_t top,
           int group_best, bool sigmoid, bool normalise, bool scale_anyway, float scale, uintptr_t bias,
           uintptr_t scores, uintptr_t index, uintptr_t weight, int threads) {
          choose_experts(at<float>(logits), tokens,
                         {experts, groups, kept_groups, top, group_best, sigmoid, normalise, scale_anyway, scale},
                         at<float>(bias), at<float>(scores), at<int64_t>(index), at<float>(weight), threads);
        },
        release());

  m.def("mla_prepare",
        [](uintptr_t q, uintptr_t kv, uintptr_t norm, float eps, uintptr_t cos, uintptr_t sin, bool interleaved,
           uintptr_t begin, uintptr_t past, uintptr_t block_begin, uintptr_t blocks, int64_t count, int64_t heads,
           int64_t nope, int64_t rope, int64_t rank, uintptr_t q_rope, uintptr_t cache, int threads) {
          mla_prepare(at<float>(q), at<float>(kv), at<float>(norm), eps, {at<float>(cos), at<float>(sin), interleaved},
                      sequences(begin, past, block_begin, blocks, count), heads, nope, rope, rank, at<float>(q_rope),
                      at<float>(cache), threads);
        },
        release());

  define(m, "rms_norm", rms_norm);

  m.def("mla_absorbed",
        [](uintptr_t q_latent, uintptr_t q_rope, uintptr_t cache, uintptr_t begin, uintptr_t past, uintptr_t block_begin,
           uintptr_t blocks, int64_t count, int64_t heads, int64_t rank, int64_t rope, float scale, uintptr_t out,
           int threads) {
          mla_absorbed(at<float>(q_latent), at<float>(q_rope), at<float>(cache),
                       sequences(begin, past, block_begin, blocks, count), heads, rank, rope, scale, at<float>(out),
                       threads);
        },
        release());
  m.def("mla_naive",
        [](uintptr_t q, uintptr_t q_rope, uintptr_t cache, uintptr_t begin, uintptr_t past, uintptr_t block_begin,
           uintptr_t blocks, int64_t count, int64_t heads, int64_t rank, int64_t rope, int64_t nope, int64_t value,
           uintptr_t kv_b, int bits, float scale, uintptr_t out, int threads) {
          mla_naive(at<float>(q), at<float>(q_rope), at<float>(cache), sequences(begin, past, block_begin, blocks, count),
                    heads, rank, rope, nope, value, at<uint8_t>(kv_b), bits, scale, at<float>(out), threads);
        },
        release());

  // ---- training -----------------------------------------------------------------------------------------------------
  m.def("bf16_units", [] { return bf16_units() ? bf16_units()->name : ""; },
        "Name of the BF16 units of the training kernels, or nothing.");
  define(m, "use_bf16_units", use_bf16_units);
  m.def("product",
        [](uintptr_t a, int64_t a_stride, int a_kind, bool a_transposed, uintptr_t b, int64_t b_stride, int b_kind,
           bool b_transposed, int64_t rows, int64_t columns, int64_t inner, uintptr_t out, int out_kind, int threads) {
          product({at<void>(a), a_stride, (Kind)a_kind}, a_transposed, {at<void>(b), b_stride, (Kind)b_kind},
                  b_transposed, rows, columns, inner, at<void>(out), columns, (Kind)out_kind, false, threads);
        },
        release());

  using Shape = std::array<int64_t, 6>;  // tokens, hidden, top, pairs, experts, inner
  static const auto experts = [](const Shape& s, uintptr_t token, uintptr_t ends, uintptr_t slot, uintptr_t weight,
                                 uintptr_t x, uintptr_t w_in, uintptr_t w_out, int kind, int w_kind) {
    return Experts{s[0], s[1], s[2], s[3], s[4], s[5], at<int64_t>(token), at<int64_t>(ends), at<int64_t>(slot),
                   at<float>(weight), at<void>(x), at<void>(w_in), at<void>(w_out), (Kind)kind, (Kind)w_kind};
  };
  m.def("experts_forward",
        [](const Shape& shape, uintptr_t token, uintptr_t ends, uintptr_t slot, uintptr_t weight, uintptr_t x,
           uintptr_t w_in, uintptr_t w_out, int kind, int w_kind, uintptr_t both, uintptr_t out, int threads) {
          experts_forward(experts(shape, token, ends, slot, weight, x, w_in, w_out, kind, w_kind), at<void>(both),
                          at<void>(out), threads);
        },
        release());
  m.def("experts_backward",
        [](const Shape& shape, uintptr_t token, uintptr_t ends, uintptr_t slot, uintptr_t weight, uintptr_t x,
           uintptr_t w_in, uintptr_t w_out, int kind, int w_kind, uintptr_t both, uintptr_t dout, uintptr_t dx,
           uintptr_t d_weight, uintptr_t d_in, uintptr_t d_out, int threads) {
          experts_backward(experts(shape, token, ends, slot, weight, x, w_in, w_out, kind, w_kind), at<void>(both),
                           at<void>(dout), at<void>(dx), at<float>(d_weight), at<void>(d_in), at<void>(d_out), threads);
        },
        release());

  define(m, "attention_forward", attention_forward);
  define(m, "attention_backward", attention_backward);

  define(m, "head_loss", head_loss);

  define(m, "norm_forward", norm_forward);
  define(m, "norm_backward", norm_backward);
  define(m, "rotate", rotate);
  define(m, "swiglu_forward", swiglu_forward);
  define(m, "swiglu_backward", swiglu_backward);

  using Factors = std::array<float, 7>;  // of an AdamwStep, in its order
  m.def("adamw8",
        [](uintptr_t weight, uintptr_t gradient, bool bf16, int64_t count, uintptr_t first, uintptr_t first_scale,
           uintptr_t second, uintptr_t second_scale, const Factors& by, uint32_t seed, uint32_t weight_seed,
           int threads) {
          adamw8(at<void>(weight), at<void>(gradient), bf16, count, at<uint8_t>(first), at<float>(first_scale),
                 at<uint8_t>(second), at<float>(second_scale),
                 {by[0], by[1], by[2], by[3], by[4], by[5], by[6], seed, weight_seed}, threads);
        },
        release());
  define(m, "momentum8", momentum8);
  define(m, "moved", moved);
  define(m, "encode_two_bits", encode_two_bits);
  define(m, "decode_two_bits", decode_two_bits);
  define(m, "encode_sparse", encode_sparse);
  define(m, "add_sparse", add_sparse);
}
