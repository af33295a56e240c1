"""A quantized model's inference forms: near the plain model, like MLA's own forms, and the same bits in any company.

Shape letters: B batch, T tokens, S positions, H hidden.
"""

from __future__ import annotations

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
from deepseek.model.cache import LatentCache
from deepseek.model.gate import Gate
from deepseek.model.mla import MLA, AttentionContext, AttentionMask
from deepseek.ops.native import native
from deepseek.quant.fused import FusedGate, FusedMLA
from deepseek.quant.linear import QuantizedLinear

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
natively = pytest.mark.skipif(native is None, reason="promised by the native kernels alone")
LENGTHS = (9, 3, 150, 1, 140)  # of the rows of a batch; some with more than one block of keys


@pytest.fixture
def quantized(tiny_config: Callable, random_model: Callable, tmp_path: Path) -> Callable[..., CausalLM]:
    """`quantized(format, **changes)`: a random model, written, quantized and loaded; its folder is `tmp_path / "q"`."""
    def make(format: Any = "nf4", **changes: Any) -> CausalLM:
        source = save_model(random_model(tiny_config(**changes)), tmp_path / "source")
        quantize(source, tmp_path / "q", format, progress=False)
        return load_model(tmp_path / "q")

    return make


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
    assert all(isinstance(layer.self_attn, FusedMLA) for layer in model.model.layers)
    assert all(isinstance(block.gate, FusedGate) for block in model.moe_blocks().values())
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


def attend(
    model: CausalLM, forward: Callable[..., Tensor], x_BTH: Tensor, mask_BT: Tensor | None,
    chunks: Sequence[int] | None, **options: Any
) -> Tensor:
    """The first layer's attention as `CausalLM.hidden` calls it, over a cache where it comes in chunks."""
    config, parts, start = model.config, [], 0
    batch, tokens = x_BTH.shape[:2]
    position_BT = torch.arange(tokens).unsqueeze(0) if mask_BT is None else (mask_BT.cumsum(1) - 1).clamp(min=0)
    cache = None if chunks is None else LatentCache(config, batch, 4)
    for width in chunks or (tokens,):
        now = slice(start, start + width)
        if cache is not None:
            cache.reserve(width)
        mask = None if mask_BT is None else mask_BT[:, : now.stop]
        visible = None if mask is None and start == 0 else AttentionMask(mask, batch, width, start, x_BTH.device)
        cos, sin = model.model.rotary(position_BT[:, now])
        context = AttentionContext(cos, sin, visible, cache, **options)
        parts.append(forward(model.model.layers[0].self_attn, x_BTH[:, now], context, 0))
        start += width
        if cache is not None:
            cache.length = start
    return torch.cat(parts, 1)


@every_variant
@pytest.mark.parametrize("attn_impl", ["naive", "absorbed"])
def test_attention_equals_mlas_own_form(quantized: Callable, attn_impl: Any, changes: dict[str, Any]) -> None:
    """In either order, over the same weights, up to the int8 of what enters a quantized product. With and without a
    cache, in chunks, with padding."""
    model = quantized(**changes)
    x_BTH = torch.randn(5, 150, model.config.hidden_size)
    bound = 1e-3 if attn_impl == "naive" else 0.02  # MLA's own absorbed form multiplies by kv_b_proj in FP32
    for side, chunks in itertools.product((None, "left", "right"), (None, (150,), (149, 1), (7, 1, 1, 141))):
        mask_BT = None if side is None else padded([torch.ones(n) for n in LENGTHS], side)[1]
        real_BT = torch.ones(5, 150, dtype=torch.bool) if mask_BT is None else mask_BT
        got, want = (attend(model, form.forward, x_BTH, mask_BT, chunks, attn_impl=attn_impl)[real_BT]
                     for form in (FusedMLA, MLA))
        assert (got - want).norm() < bound * want.norm(), (side, chunks)


@every_variant
def test_the_order_is_the_callers_or_follows_the_call(quantized: Callable, changes: dict[str, Any]) -> None:
    """Naive for several tokens, absorbed for one; what the model runs is what attention alone does with that order."""
    model = quantized(**changes)
    x_BTH = torch.randn(2, 9, model.config.hidden_size)
    naive, absorbed = (attend(model, FusedMLA.forward, x_BTH, None, (8, 1), attn_impl=attn_impl)
                       for attn_impl in ("naive", "absorbed"))
    auto = attend(model, FusedMLA.forward, x_BTH, None, (8, 1))
    assert torch.equal(auto[:, :8], naive[:, :8]) and torch.equal(auto[:, 8:], absorbed[:, 8:])
    assert 0 < (naive - absorbed).norm() < 0.02 * naive.norm()


@every_native
def test_holes_and_other_caches_take_mlas_own_form(quantized: Callable, changes: dict[str, Any]) -> None:
    model = quantized(**changes)
    ids_BT, mask_BT = ids(2, 12), torch.ones(2, 12, dtype=torch.bool)
    mask_BT[0, 4:7] = False
    with_hole = model(ids_BT, mask_BT=mask_BT)
    without = model(torch.cat((ids_BT[:1, :4], ids_BT[:1, 7:]), 1))
    assert torch.cosine_similarity(with_hole[0, 7:], without[0, 4:], -1).mean() > 0.97
    half = model.new_cache(2, dtype=torch.bfloat16)
    assert torch.cosine_similarity(model(ids_BT, cache=half), model(ids_BT), -1).mean() > 0.97


@pytest.mark.parametrize("changes", [{}, VARIANTS["V2"]], ids=["V3", "V2"])
def test_gate_equals_the_models_own(quantized: Callable, changes: dict[str, Any]) -> None:
    model = quantized(**changes)
    assert model.moe_blocks()
    for block in model.moe_blocks().values():
        x_TH = torch.randn(300, model.config.hidden_size)
        for got, want in zip(block.gate(x_TH), Gate.forward(block.gate, x_TH), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_fused_forms_add_nothing_to_the_state(quantized: Callable) -> None:
    model = quantized()
    assert not [name for name in model.state_dict() if name.endswith(("_PH16", "attn.key", "attn.value"))]
    kv_b = model.model.layers[0].self_attn.kv_b_proj
    assert isinstance(kv_b, QuantizedLinear) and kv_b._dense is None  # no copy beside the panels


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
            if side == "left":  # on the right there is a hole before the new token, which takes MLA's own form
                assert torch.equal(after_BTV[b], model(more_BT[b : b + 1], cache=alone)[0]), b
