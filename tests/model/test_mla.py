"""MLA: the two orders of its products against each other and against the formula by hand, and the latent cache.

Shape letters: B batch, T new tokens, S positions, H hidden, N heads, R latent rank, C = R + rope width.
"""

from __future__ import annotations

import cmath
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek.config import LongRope, ModelConfig, YarnScaling
from deepseek.model.cache import LatentCache
from deepseek.model.layers import Rotary
from deepseek.model.mla import MLA, AttentionContext, AttentionMask, AttnImpl
from deepseek.ops import rotate

CONFIG = ModelConfig(
    vocab_size=48, hidden_size=16, num_hidden_layers=2, num_attention_heads=3, intermediate_size=24,
    moe_intermediate_size=8, n_routed_experts=4, num_experts_per_tok=2, kv_lora_rank=8, qk_nope_head_dim=6,
    qk_rope_head_dim=4, v_head_dim=10)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"q_lora_rank": 12, "attention_bias": True},
    {"rope_interleave": False},
    {"yarn": YarnScaling(8.0, 16, beta_fast=4.0, mscale=1.0, mscale_all_dim=0.5), "v_head_dim": 4},
    {"longrope": LongRope((1.0, 3.0), 16, attention_factor=1.2), "qk_nope_head_dim": 0, "v_head_dim": 4},
]
IMPLS: tuple[AttnImpl, ...] = ("naive", "absorbed")
variants = pytest.mark.parametrize("changes", VARIANTS, ids=lambda c: ",".join(c) or "plain")


def make(config: ModelConfig) -> tuple[MLA, Rotary]:
    generator = torch.Generator().manual_seed(0)
    mla = MLA(config)
    with torch.no_grad():
        for parameter in mla.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.4, generator=generator)
    return mla.requires_grad_(False), Rotary(config)


def hidden(batch: int, tokens: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, tokens, CONFIG.hidden_size, generator=torch.Generator().manual_seed(seed))


def angles(rotary: Rotary, start: int, tokens: int) -> tuple[Tensor, Tensor]:
    cos, sin = rotary(torch.arange(start, start + tokens).unsqueeze(0))
    return cos, sin


def by_hand(mla: MLA, rotary: Rotary, x_TH: Tensor) -> Tensor:
    """The equations of the paper for one sequence, head by head and position by position, in double precision.

    Rotary pairs are complex numbers turned by their angle; a dot product is the real part of q times conjugate k.
    """
    config = mla.config
    weight = {name: p.double() for name, p in mla.named_parameters()}

    def project(name: str, x: Tensor) -> Tensor:
        return weight[f"{name}.weight"] @ x + weight.get(f"{name}.bias", 0.0)

    def norm(name: str, x: Tensor) -> Tensor:
        return weight[f"{name}.weight"] * x / torch.sqrt((x * x).mean() + 1e-6)

    def turned(x: Tensor, position: int) -> list[complex]:
        half = len(x) // 2
        pairs = [(x[2 * i], x[2 * i + 1]) if config.rope_interleave else (x[i], x[i + half]) for i in range(half)]
        return [complex(a, b) * cmath.exp(1j * position * float(w)) * rotary.scale
                for (a, b), w in zip(pairs, rotary.inv_P, strict=True)]

    nope = config.qk_nope_head_dim
    queries, keys, values = [], [], []
    for position, x in enumerate(x_TH.double()):
        if config.q_lora_rank is None:
            q = project("q_proj", x)
        else:
            q = project("q_b_proj", norm("q_a_layernorm", project("q_a_proj", x)))
        latent, k_rope = project("kv_a_proj_with_mqa", x).split((config.kv_lora_rank, config.qk_rope_head_dim))
        kv = project("kv_b_proj", norm("kv_a_layernorm", latent))
        key = turned(k_rope, position)
        heads_q, heads_kv = q.view(config.num_attention_heads, -1), kv.view(config.num_attention_heads, -1)
        queries.append([(h[:nope], turned(h[nope:], position)) for h in heads_q])
        keys.append([(h[:nope], key) for h in heads_kv])
        values.append([h[nope:] for h in heads_kv])
    out = []
    for t in range(len(x_TH)):
        heads = []
        for n in range(config.num_attention_heads):
            q_nope, q_rope = queries[t][n]
            scores = []
            for s in range(t + 1):
                k_nope, k_rope = keys[s][n]
                rope = sum((a * b.conjugate()).real for a, b in zip(q_rope, k_rope, strict=True))
                scores.append((float(q_nope @ k_nope) + rope) * config.softmax_scale)
            top = max(scores)
            shares = [math.exp(s - top) for s in scores]
            heads.append(sum(share / sum(shares) * values[s][n] for s, share in enumerate(shares)))
        out.append(project("o_proj", torch.cat(heads)))
    return torch.stack(out).float()


@variants
@pytest.mark.parametrize("attn_impl", IMPLS)
def test_both_orders_are_the_formula(changes: dict[str, Any], attn_impl: Any) -> None:
    mla, rotary = make(CONFIG.with_(**changes))
    x = hidden(2, 7)
    out = mla(x, AttentionContext(*angles(rotary, 0, 7), attn_impl=attn_impl), 0)
    for row in range(2):
        torch.testing.assert_close(out[row], by_hand(mla, rotary, x[row]), rtol=1e-4, atol=1e-5)


@variants
@pytest.mark.parametrize("attn_impl", ["naive", "absorbed", "auto"])
@pytest.mark.parametrize("steps", [(9,), (4, 1, 1, 3), (1,) * 9])
def test_the_cache_changes_nothing(changes: dict[str, Any], attn_impl: Any, steps: tuple[int, ...]) -> None:
    config = CONFIG.with_(**changes)
    mla, rotary = make(config)
    x = hidden(2, 9)
    want = mla(x, AttentionContext(*angles(rotary, 0, 9), attn_impl="naive"), 0)
    cache = LatentCache(config, 2, capacity=2)
    parts = []
    for tokens in steps:
        cache.reserve(tokens)
        start, end = cache.length, cache.length + tokens
        visible = AttentionMask(None, 2, tokens, start, x.device)
        context = AttentionContext(*angles(rotary, start, tokens), visible, cache, attn_impl)
        parts.append(mla(x[:, start:end], context, 1))
        cache.length = end
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-4, atol=1e-5)


def test_both_orders_agree_under_a_padding_mask() -> None:
    mla, rotary = make(CONFIG)
    x, turns = hidden(2, 6), angles(rotary, 0, 6)
    real = torch.ones(2, 6, dtype=torch.bool)
    real[0, :2] = False  # the first two rows of sequence 0 may look nowhere
    visible = AttentionMask(real, 2, 6, 0, x.device)
    naive, absorbed = (mla(x, AttentionContext(*turns, visible, None, impl), 0) for impl in IMPLS)
    seen = visible.dense.any(-1)[:, 0]
    torch.testing.assert_close(naive[seen], absorbed[seen], rtol=1e-4, atol=1e-5)
    assert bool(naive.isfinite().all()) and bool(absorbed.isfinite().all())


def test_both_orders_agree_in_bf16() -> None:
    mla, rotary = make(CONFIG)
    x, turns = hidden(2, 6).bfloat16(), angles(rotary, 0, 6)
    naive, absorbed = (mla(x, AttentionContext(*turns, None, None, impl), 0) for impl in IMPLS)
    assert naive.dtype == absorbed.dtype == torch.bfloat16
    torch.testing.assert_close(naive.float(), absorbed.float(), rtol=5e-2, atol=1e-1)


@pytest.mark.parametrize(("tokens", "cached", "chosen"), [
    (1, True, "_absorbed"), (3, True, "_naive"), (1, False, "_naive")])
def test_one_new_token_is_absorbed(tokens: int, cached: bool, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mla, rotary = make(CONFIG)
    for form in ("_naive", "_absorbed"):
        if form != chosen:
            monkeypatch.setattr(mla, form, None)
    cache = LatentCache(CONFIG, 1) if cached else None
    x = hidden(1, tokens)
    assert mla(x, AttentionContext(*angles(rotary, 0, tokens), None, cache), 0).shape == x.shape


# ---- rotation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleave", [True, False])
def test_a_dot_product_sees_only_the_distance(interleave: bool) -> None:
    rotary = Rotary(CONFIG)
    q, k = hidden(1, 1)[..., :4].unsqueeze(2), hidden(1, 1, seed=2)[..., :4].unsqueeze(2)

    def product(a: int, b: int) -> float:
        (cos_a, sin_a), (cos_b, sin_b) = (rotary(torch.tensor([[p]])) for p in (a, b))
        return float((rotate(q, cos_a, sin_a, interleave) * rotate(k, cos_b, sin_b, interleave)).sum())

    assert product(7, 3) == pytest.approx(product(104, 100), abs=1e-4)
    assert product(0, 0) == pytest.approx(float((q * k).sum()), abs=1e-6)
    assert product(7, 3) != pytest.approx(product(3, 7), abs=1e-3)


# ---- the cache ----------------------------------------------------------------------------------------------------


def test_the_cache_is_as_small_as_mla_promises() -> None:
    config = ModelConfig.preset("nano")
    cache = LatentCache(config, 2, capacity=4, dtype=torch.bfloat16)
    assert cache.data.shape == (config.num_hidden_layers, 2, 4, config.kv_lora_rank + config.qk_rope_head_dim)
    assert cache.data.dtype == torch.bfloat16 and cache.batch == 2 and cache.length == 0 and cache.valid_BS is None


def test_it_grows_by_doubling_and_keeps_what_it_holds() -> None:
    cache = LatentCache(CONFIG, 2, capacity=2)
    grown, rows = [], []
    for step in range(20):
        cache.reserve(1)
        grown.append(cache.data.shape[2])
        rows.append(torch.full((2, 1, CONFIG.latent_dim), float(step)))
        for layer in range(2):
            seen = cache.extend(layer, rows[-1] + 100 * layer)
            assert torch.equal(seen, torch.cat(rows, 1) + 100 * layer)
        cache.length += 1
    assert sorted(set(grown)) == [2, 4, 8, 16, 32]
    before = cache.data
    cache.reserve(12)
    assert cache.data is before  # 20 + 12 fit
    cache.reserve(1000)
    assert cache.data.shape[2] == 1020  # more than double at once


def test_rows_are_kept_and_reordered() -> None:
    cache = LatentCache(CONFIG, 3, capacity=4)
    rows = torch.arange(3.0).view(3, 1, 1).expand(3, 2, CONFIG.latent_dim)
    cache.extend(0, rows)
    cache.length = 2
    cache.valid_BS = torch.tensor([[True, True], [False, True], [True, False]])
    cache.select(torch.tensor([2, 0, 0, 1]))
    assert cache.batch == 4 and cache.data[0, :, :2, 0].tolist() == [[2, 2], [0, 0], [0, 0], [1, 1]]
    assert cache.valid_BS.tolist() == [[True, False], [True, True], [True, True], [False, True]]
    cache.select(torch.tensor([False, True, False, True]))
    assert cache.data[0, :, 0, 0].tolist() == [0, 1] and cache.length == 2
