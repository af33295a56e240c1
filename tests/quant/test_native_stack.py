"""A quantized model's native layers: near the plain model, like the modules' own forms, and the same bits in any
company.

Shape letters: B batch, T tokens, S positions, H hidden.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek.checkpoint import load_model, save_model
from deepseek.convert import dequantize, quantize
from deepseek.model import CausalLM, RoutingRecord
from deepseek.model.adapter import linears
from deepseek.model.adapter_paths import LowRank
from deepseek.model.adapters import Mixture, add, rows_of, whole
from deepseek.model.mla import AttentionContext
from deepseek.quant.linear import QuantizedLinear
from deepseek.quant.native_stack import FEW, NativeLayer, NativeStack
from tests.helpers.operations import natively

VARIANTS: dict[str, dict[str, Any]] = {
    "values in panels of their own": {},
    "values where they lie": dict(qk_nope_head_dim=16, v_head_dim=32),
    "a compressed query, biases": dict(q_lora_rank=24, attention_bias=True, num_attention_heads=5),
    "not interleaved": dict(rope_interleave=False, hidden_size=72, num_attention_heads=20),
    "V2": dict(model_type="deepseek_v2", topk_method="greedy", scoring_func="softmax", norm_topk_prob=False, n_group=1,
               topk_group=1, n_shared_experts=2),
    "all of a query is rotary": dict(
        qk_nope_head_dim=0, v_head_dim=16, first_k_dense_replace=2, attention_bias=True, tie_word_embeddings=True),
    "a rank that no vector divides": dict(kv_lora_rank=20),
}
every_variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
every_native = pytest.mark.parametrize("changes", list(VARIANTS.values())[:-1], ids=list(VARIANTS)[:-1])
LENGTHS = (9, 3, 150, 1, 140)  # of the rows of a batch; some with more than one block of keys


@pytest.fixture
def quantized(tiny_config: Callable, random_model: Callable, tmp_path: Path) -> Callable[..., CausalLM]:
    """`quantized(format, **changes)`: a random model, written, quantized and loaded; its folder is `tmp_path / "q"`."""
    def make(format: Any = "nf4", **changes: Any) -> CausalLM:
        source = save_model(random_model(tiny_config(**changes)), tmp_path / "source")
        quantize(source, tmp_path / "q", format, progress=False)
        return load_model(tmp_path / "q")

    return make


def own_layers(model: CausalLM) -> list[NativeLayer]:
    stack = NativeStack.of(model)
    assert stack is not None
    return list(stack.own)  # type: ignore[arg-type]


def ids(batch: int, tokens: int) -> Tensor:
    return torch.randint(0, 96, (batch, tokens))


def padded(rows: Sequence[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """(ids, mask) of rows of different lengths; padding is a token like any other."""
    width = max(map(len, rows))
    ids_BT, mask_BT = torch.full((len(rows), width), 5), torch.zeros(len(rows), width, dtype=torch.bool)
    for b, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(len(row))
        ids_BT[b, place], mask_BT[b, place] = row, True
    return ids_BT, mask_BT


# ---- near the plain model -------------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_logits_are_near_those_of_the_same_weights(
    quantized: Callable, format: Any, changes: dict[str, Any], tmp_path: Path
) -> None:
    """The weights are the same numbers; what differs is the int8 of the activations. A token whose experts change by
    that may well go elsewhere."""
    model = quantized(format, **changes)
    plain = load_model(dequantize(tmp_path / "q", tmp_path / "plain", "float32", progress=False))
    assert all(layer.attention is not None for layer in own_layers(model))
    assert all(layer.quantized for layer in own_layers(model))
    ids_BT, ours, theirs = ids(4, 60), RoutingRecord(), RoutingRecord()
    with torch.no_grad():
        got_BTV, want_BTV = model(ids_BT, routing=ours), plain(ids_BT, routing=theirs)
    assert got_BTV.dtype == torch.float32 and got_BTV.isfinite().all() and not got_BTV.requires_grad
    same_T = torch.stack([(ours.routes[i].index_TK.sort()[0] == theirs.routes[i].index_TK.sort()[0]).all(-1)
                          for i in ours.routes]).all(0)
    assert same_T.float().mean() > 0.6
    cosine_T = torch.cosine_similarity(got_BTV, want_BTV, -1).flatten()
    assert cosine_T[same_T].mean() > 0.99 and cosine_T.mean() > 0.97


# ---- equal to MLA's own forms ---------------------------------------------------------------------------------------


def attend(model: CausalLM, natively: bool, x_BTH: Tensor, mask_BT: Tensor | None, chunks: Sequence[int],
           attn_impl: Any) -> Tensor:
    """The first layer's attention over a cache, in chunks; zeros for padding."""
    mla, attention, out_BTH = model.model.layers[0].self_attn, own_layers(model)[0].attention, torch.zeros_like(x_BTH)
    assert attention is not None
    cache, start = model.new_cache(len(x_BTH), 4), 0
    for width in chunks:
        now = slice(start, start + width)
        real_BT = torch.ones(len(x_BTH), width, dtype=torch.bool) if mask_BT is None else mask_BT[:, now].bool()
        counts = real_BT.sum(1).tolist()
        pack = cache.pack(counts, attn_impl, None)
        cos, sin = model.model.rotary(pack.positions[None])
        context = AttentionContext(cos, sin, pack)
        x_1TH = x_BTH[:, now][real_BT][None]
        out = attention(mla, x_1TH, context, 0) if natively else mla(x_1TH, context, 0)
        out_BTH[:, now][real_BT] = out[0]
        cache.advance(counts)
        start += width
    return out_BTH


@every_variant
@pytest.mark.parametrize("attn_impl", ["naive", "absorbed"])
def test_attention_equals_mlas_own_form(quantized: Callable, attn_impl: Any, changes: dict[str, Any]) -> None:
    """In either order, over the same weights, up to the int8 of what enters a quantized product. In chunks, with
    padding."""
    model = quantized(**changes)
    x_BTH = torch.randn(5, 150, model.config.hidden_size)
    bound = 1e-3 if attn_impl == "naive" else 0.02  # MLA's own absorbed form multiplies by kv_b_proj in FP32
    for side, chunks in itertools.product((None, "left", "right"), ((150,), (149, 1), (7, 1, 1, 141))):
        mask_BT = None if side is None else padded([torch.ones(n) for n in LENGTHS], side)[1]
        got, want = (attend(model, form, x_BTH, mask_BT, chunks, attn_impl) for form in (True, False))
        assert 0 < (got - want).norm() < bound * want.norm(), (side, chunks)


@every_native
def test_the_order_is_the_callers_or_follows_the_call(quantized: Callable, changes: dict[str, Any]) -> None:
    """Naive for several tokens, absorbed for one after them."""
    model, ids_BT = quantized(**changes), ids(2, 9)

    def logits(*orders: Any) -> Tensor:
        cache = model.new_cache(2)
        return torch.cat([model(part_BT, cache=cache, attn_impl=order)
                          for part_BT, order in zip(ids_BT.split((8, 1), 1), orders, strict=True)], 1)

    auto, naive = logits("auto", "auto"), logits("naive", "naive")
    assert torch.equal(auto, logits("naive", "absorbed"))
    assert torch.equal(auto[:, :8], naive[:, :8]) and not torch.equal(auto[:, 8], naive[:, 8])


@every_native
def test_a_cache_of_another_dtype_takes_mlas_own_form(quantized: Callable, changes: dict[str, Any]) -> None:
    model, ids_BT = quantized(**changes), ids(2, 12)
    half = model.new_cache(2, dtype=torch.bfloat16)
    assert torch.cosine_similarity(model(ids_BT, cache=half), model(ids_BT), -1).mean() > 0.97


@pytest.mark.parametrize("changes", [{}, VARIANTS["V2"]], ids=["V3", "V2"])
def test_gate_equals_the_models_own(quantized: Callable, changes: dict[str, Any]) -> None:
    model = quantized(**changes)
    assert model.moe_blocks()
    for layer, block in model.moe_blocks().items():
        x_TH = torch.randn(300, model.config.hidden_size)
        for got, want in zip(own_layers(model)[layer].choose(block.gate, x_TH), block.gate(x_TH), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_the_stack_adds_nothing_to_the_state(quantized: Callable) -> None:
    model = quantized()
    assert not [name for name in model.state_dict() if name.startswith("layer_runner")]
    kv_b = model.model.layers[0].self_attn.kv_b_proj
    assert isinstance(kv_b, QuantizedLinear)
    assert not any(isinstance(kept, Tensor) for kept in vars(kv_b).values()), "a copy beside the panels"


@natively
@every_native
def test_one_call_has_the_bits_of_layer_by_layer(quantized: Callable, changes: dict[str, Any]) -> None:
    model, rows = quantized(**changes), [ids(1, n)[0] for n in LENGTHS]
    ids_BT, mask_BT = padded(rows, "left")
    together, stack = RoutingRecord(), NativeStack.of(model)
    assert stack is not None
    want = model(ids_BT, mask_BT=mask_BT, routing=together)
    [one_call] = stack.stacks.values()
    one_call.ready = False
    apart = RoutingRecord()
    assert torch.equal(model(ids_BT, mask_BT=mask_BT, routing=apart), want)
    for layer, route in together.routes.items():
        assert all(map(torch.equal, route, apart.routes[layer]))


def add_adapters(model: CausalLM, *targets: str) -> Mixture:
    """Two random adapters, the second of them on o_proj alone; returns a mixture of both."""
    for name, own in (("one", targets), ("two", targets[-1:])):
        found: dict[str, Any] = {target: module for target, module in linears(model).items() if target.endswith(own)}
        add(model, name, {target: LowRank(torch.randn(3, module.in_features), torch.randn(module.out_features, 3), 0.05,
                                          exact=True) for target, module in found.items()}, {})
    return Mixture.of({"one": 0.7, "two": -0.5})


@natively
@every_native
@pytest.mark.parametrize("attn_impl", ["naive", "absorbed"])
def test_one_call_with_adapters_has_the_bits_of_layer_by_layer(
    quantized: Callable, changes: dict[str, Any], attn_impl: Any
) -> None:
    model, ids_BT = quantized("int8", **changes), ids(3, 20)
    base, mixture = model(ids_BT), add_adapters(model, "q_a_proj", "q_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")
    [one_call] = model.layer_runner.stacks.values()
    calls = count_calls(model.layer_runner)
    for adapter in (mixture, "one", "two"):
        calls.clear()
        with rows_of(whole(adapter)):
            want = model(ids_BT, attn_impl=attn_impl)
            assert calls == [1] * one_call.ready
            one_call.ready, ready = False, one_call.ready
            assert torch.equal(model(ids_BT, attn_impl=attn_impl), want) and not torch.allclose(want, base, atol=1e-2)
        one_call.ready = ready


@natively
def test_what_adapters_do_elsewhere_runs_layer_by_layer(quantized: Callable) -> None:
    model = quantized(qk_nope_head_dim=16, v_head_dim=32)
    model(ids(1, 3))
    add_adapters(model, "kv_b_proj", "o_proj")
    calls = count_calls(model.layer_runner)
    for adapter, times in ((None, 1), ("two", 1), ("one", 0), (Mixture.of({"one": 0.5, "two": 0.5}), 0)):
        calls.clear()
        with rows_of(whole(adapter)):
            model(ids(1, 3))
        assert len(calls) == times, adapter


@natively
def test_a_copy_and_a_moved_model_run_on_their_own_tensors(quantized: Callable) -> None:
    model, ids_BT = quantized(), ids(2, 9)
    want = model(ids_BT)
    twin = copy.deepcopy(model)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.zero_()
    assert torch.equal(twin(ids_BT), want) and torch.equal(twin.double().float()(ids_BT), want)


@natively
def test_a_layer_that_is_moved_alone_is_run_as_it_is_then(quantized: Callable) -> None:
    model, ids_BT = copy.deepcopy(quantized(qk_nope_head_dim=16, v_head_dim=32)), ids(2, 9)
    want, norm, stack = model(ids_BT), model.model.layers[0].input_layernorm, NativeStack.of(model)
    assert stack is not None and stack.stacks[0].ready
    norm.weight.data = norm.weight.data * 2
    assert not torch.allclose(model(ids_BT), want) and stack.stacks[0].ready
    norm.weight.data = norm.weight.data / 2
    assert torch.equal(model(ids_BT), want)
    model.model.layers[0].double()
    torch.testing.assert_close(model(ids_BT), want)
    assert not stack.stacks[0].ready
    model.model.layers[0].float()
    assert torch.equal(model(ids_BT), want) and stack.stacks[0].ready
    model.model.layers[0].to("meta")
    with pytest.raises(RuntimeError, match="meta"):
        model(ids_BT)


# ---- plain weights --------------------------------------------------------------------------------------------------


@natively
@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_layers_are_near_the_modules(
    random_model: Callable, tiny_config: Callable, changes: dict[str, Any], dtype: torch.dtype
) -> None:
    """Prompts and single tokens of several sequences, in either order; the modules compute in FP32 on equal weights. A
    step of more tokens runs by the modules."""
    model = random_model(tiny_config(**changes)).to(dtype).eval()
    widened, takes = copy.deepcopy(model).float(), changes is not VARIANTS["a rank that no vector divides"] and (
        model.config.qk_nope_head_dim % 16 == 0 and model.config.v_head_dim % 16 == 0)
    stack = NativeStack.beside(model)
    assert (stack is not None) == takes
    if stack is None:
        return
    calls = count_calls(stack)
    caches = model.new_cache(3, 16), model.new_cache(3, 16)
    for tokens, attn_impl in ((4, "naive"), (1, "absorbed"), (1, "naive"), (5, "absorbed"), (30, "naive")):
        ids_T, ours, theirs = ids(1, 3 * tokens)[0], RoutingRecord(), RoutingRecord()
        packs = [cache.pack([tokens] * 3, attn_impl, None) for cache in caches]
        with torch.inference_mode():
            got_TH = model.packed(ids_T, packs[0], ours, stack)
            want_TH = widened.packed(ids_T, packs[1], theirs)
        for cache in caches:
            cache.advance([tokens] * 3)
        assert got_TH.dtype == dtype and calls == [1] * (3 * tokens <= FEW)
        if calls or dtype == torch.float32:
            bound = 1e-5 if dtype == torch.float32 else 0.01  # the result is rounded to BF16
            assert (got_TH.float() - want_TH).norm() < bound * want_TH.norm(), (tokens, attn_impl)
            for layer, route in ours.routes.items():
                torch.testing.assert_close(route, theirs.routes[layer], rtol=1e-3, atol=1e-5)
        calls.clear()


def count_calls(stack: NativeStack) -> list[int]:
    """Grows by one with each native call."""
    [own], calls = stack.stacks.values(), list[int]()
    run = own.run
    own.run = lambda *args: calls.append(1) or run(*args)  # type: ignore[method-assign]
    return calls


@natively
def test_plain_layers_are_read_where_they_lie(random_model: Callable, tiny_config: Callable) -> None:
    """No copy of a matrix is made but the key half of kv_b_proj; a model that is changed is run as it is then."""
    model = random_model(tiny_config(qk_nope_head_dim=0, v_head_dim=16)).bfloat16()
    stack, ids_T = NativeStack.beside(model), ids(1, 3)[0]
    assert stack is not None and not list(stack.buffers()) and model.layer_runner is None

    def run(runner: NativeStack | None) -> Tensor:
        with torch.inference_mode():
            return model.packed(ids_T, model.new_cache(1).pack([3], "absorbed", None), None, runner)

    before = run(stack)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert not torch.allclose(run(stack), before, rtol=0.05, atol=0.05)
    model.model.layers[0].self_attn.o_proj.weight.data = model.model.layers[0].self_attn.o_proj.weight.data * -1
    assert torch.equal(run(stack), run(NativeStack.beside(model)))


def test_models_that_plain_layers_are_not_for(random_model: Callable, tiny_config: Callable) -> None:
    changes = dict(qk_nope_head_dim=16, v_head_dim=16)
    for model in (random_model(tiny_config(**changes)).half(), random_model(tiny_config(**changes)).double(),
                  CausalLM.on_meta(tiny_config(**changes))):
        assert NativeStack.beside(model) is None


# ---- the same bits --------------------------------------------------------------------------------------------------


@natively
@every_native
@pytest.mark.parametrize("attn_impl", ["naive", "absorbed"])
def test_prefill_and_decode_have_the_bits_of_one_pass(
    quantized: Callable, attn_impl: Any, changes: dict[str, Any]
) -> None:
    """In one and the same order."""
    model = quantized(**changes)
    ids_BT = ids(2, 160)
    whole_BTV = model(ids_BT, attn_impl=attn_impl)
    for chunks in ((150, *[1] * 10), (1, 128, 31), (7, 153), (160,)):
        cache = model.new_cache(2, 16)
        parts = [model(part_BT, cache=cache, attn_impl=attn_impl) for part_BT in ids_BT.split(chunks, 1)]
        assert torch.equal(torch.cat(parts, 1), whole_BTV), chunks


@natively
@every_native
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_row_of_a_batch_has_the_bits_of_the_row_alone(
    quantized: Callable, format: Any, changes: dict[str, Any]
) -> None:
    """Five rows of different lengths, padded on either side; then one more token each, as in generation."""
    model = quantized(format, **changes)
    rows, more_BT = [ids(1, n)[0] for n in LENGTHS], ids(5, 1)
    for side in ("left", "right"):
        ids_BT, mask_BT = padded(rows, side)
        cache = model.new_cache(5, 16)
        logits_BTV = model(ids_BT, mask_BT=mask_BT, cache=cache)
        after_BTV = model(more_BT, cache=cache)
        for b, row in enumerate(rows):
            alone = model.new_cache(1, 16)
            row_TV = model(row.unsqueeze(0), cache=alone, attn_impl="naive")[0]
            assert torch.equal(logits_BTV[b][mask_BT[b]], row_TV), (side, b)
            assert torch.equal(after_BTV[b], model(more_BT[b : b + 1], cache=alone)[0]), b


@natively
@every_native
def test_a_hole_in_a_mask_is_as_if_it_were_not_there(quantized: Callable, changes: dict[str, Any]) -> None:
    model, ids_BT, mask_BT = quantized(**changes), ids(2, 12), torch.ones(2, 12, dtype=torch.bool)
    mask_BT[0, 4:7] = False
    without = model(torch.cat((ids_BT[:1, :4], ids_BT[:1, 7:]), 1))
    assert torch.equal(model(ids_BT, mask_BT=mask_BT)[0][mask_BT[0]], without[0])
