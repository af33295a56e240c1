// The only file that knows Python. Pointers come as integers from ops/, which has checked shapes, types and layout.
#include <nanobind/nanobind.h>

#include "kernels.h"
#include "quantised.h"

namespace nb = nanobind;
using namespace deepseek;

namespace {

template <typename T>
T* at(uintptr_t p) {
  return reinterpret_cast<T*>(p);
}

using release = nb::call_guard<nb::gil_scoped_release>;

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Kernels of MoE-DR (csrc/).";
  m.def("isa", [] { return kernels().name; }, "Name of the instruction set in use.");

  m.def("quantise_panels",
        [](uintptr_t w, int64_t rows, int64_t columns, int bits, uintptr_t out, int threads) {
          double squares[2];
          {
            nb::gil_scoped_release release;
            quantise_panels(at<float>(w), rows, columns, bits, at<uint8_t>(out), squares, threads);
          }
          return nb::make_tuple(squares[0], squares[1]);
        });

  m.def("quantised_linear",
        [](uintptr_t x, int64_t tokens, int64_t groups, int64_t columns, uintptr_t w, int64_t stride, int64_t rows,
           int bits, uintptr_t out, int threads) {
          quantised_linear(at<float>(x), tokens, groups, columns, at<uint8_t>(w), stride, rows, bits, at<float>(out),
                           threads);
        },
        release());

  m.def("quantised_experts",
        [](uintptr_t x, int64_t tokens, int64_t hidden, uintptr_t index, uintptr_t weight, int64_t top,
           uintptr_t experts, int64_t num_experts, int64_t inner, uintptr_t shared, int64_t shared_inner, int bits,
           uintptr_t out, int threads) {
          quantised_experts(at<float>(x), tokens, hidden, at<int64_t>(index), at<float>(weight), top,
                            at<const uint8_t*>(experts), num_experts, inner, at<uint8_t>(shared), shared_inner, bits,
                            at<float>(out), threads);
        },
        release());

  m.def("panel_linear",
        [](uintptr_t x, int64_t tokens, int64_t groups, int64_t columns, int64_t token_stride, int64_t group_stride,
           uintptr_t w, bool bf16, int64_t rows, uintptr_t out, int threads) {
          panel_linear(at<float>(x), tokens, groups, columns, token_stride, group_stride, at<void>(w), bf16, rows,
                       at<float>(out), threads);
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
        [](uintptr_t q, uintptr_t kv, uintptr_t norm, float eps, uintptr_t cos, uintptr_t sin, bool per_sequence,
           bool interleaved, int64_t batch, int64_t tokens, int64_t heads, int64_t nope, int64_t rope, int64_t rank,
           uintptr_t q_rope, uintptr_t cache, int64_t stride, int64_t past, int threads) {
          mla_prepare(at<float>(q), at<float>(kv), at<float>(norm), eps,
                      {at<float>(cos), at<float>(sin), per_sequence, interleaved}, batch, tokens, heads, nope, rope, rank,
                      at<float>(q_rope), at<float>(cache), stride, past, threads);
        },
        release());

  m.def("rms_norm",
        [](uintptr_t x, int64_t tokens, int64_t width, int64_t stride, uintptr_t w, float eps, uintptr_t out,
           int threads) { rms_norm(at<float>(x), tokens, width, stride, at<float>(w), eps, at<float>(out), threads); },
        release());

  m.def("mla_attention",
        [](uintptr_t q_latent, uintptr_t q_rope, uintptr_t cache, int64_t stride, uintptr_t first, uintptr_t past,
           int64_t batch, int64_t tokens, int64_t heads, int64_t rank, int64_t rope, float scale, uintptr_t out,
           int threads) {
          mla_attention(at<float>(q_latent), at<float>(q_rope), at<float>(cache), stride, at<int64_t>(first),
                        at<int64_t>(past), batch, tokens, heads, rank, rope, scale, at<float>(out), threads);
        },
        release());
}
