"""MLA: the two orders of its products against each other and against the formula by hand, and a batch's cache.

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
from deepseek.model.cache import PAGE, BatchCache, Chunk, Impl, PackedBatch
from deepseek.model.layers import Rotary
from deepseek.model.mla import MLA, AttentionContext, AttentionMask
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
IMPLS: tuple[Impl, ...] = ("naive", "absorbed")
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
@pytest.mark.parametrize("attn_impl", IMPLS)
@pytest.mark.parametrize("steps", [(9,), (4, 1, 1, 3), (1,) * 9])
def test_the_cache_changes_nothing(changes: dict[str, Any], attn_impl: Any, steps: tuple[int, ...]) -> None:
    config = CONFIG.with_(**changes)
    mla, rotary = make(config)
    x = hidden(2, 9)
    want = mla(x, AttentionContext(*angles(rotary, 0, 9)), 0)
    cache, parts = BatchCache(config, 2, capacity=2), []
    for part in x.split(steps, 1):
        counts = [part.shape[1]] * 2
        pack = cache.pack(counts, attn_impl, None)
        cos, sin = rotary(pack.positions[None])
        out = mla(part.flatten(0, 1)[None], AttentionContext(cos, sin, pack), 1)
        parts.append(out[0].unflatten(0, (2, -1)))
        cache.advance(counts)
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-4, atol=1e-5)


def test_both_orders_agree_under_a_padding_mask() -> None:
    mla, rotary = make(CONFIG)
    x, turns = hidden(2, 6), angles(rotary, 0, 6)
    real = torch.ones(2, 6, dtype=torch.bool)
    real[0, :2] = False  # the first two rows of sequence 0 may look nowhere
    visible = AttentionMask(real)
    naive, absorbed = (mla(x, AttentionContext(*turns, visible, impl), 0) for impl in IMPLS)
    seen = visible.dense.any(-1)[:, 0]
    torch.testing.assert_close(naive[seen], absorbed[seen], rtol=1e-4, atol=1e-5)
    assert bool(naive.isfinite().all()) and bool(absorbed.isfinite().all())


def test_both_orders_agree_in_bf16() -> None:
    mla, rotary = make(CONFIG)
    x, turns = hidden(2, 6).bfloat16(), angles(rotary, 0, 6)
    naive, absorbed = (mla(x, AttentionContext(*turns, None, impl), 0) for impl in IMPLS)
    assert naive.dtype == absorbed.dtype == torch.bfloat16
    torch.testing.assert_close(naive.float(), absorbed.float(), rtol=5e-2, atol=1e-1)


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
    cache = BatchCache(config, 2, capacity=4, dtype=torch.bfloat16)
    width = config.kv_lora_rank + config.qk_rope_head_dim
    assert cache.pool.data.shape == (config.num_hidden_layers, 2, PAGE, width)
    assert cache.pool.data.dtype == torch.bfloat16 and cache.batch == 2 and cache.length == 0


def rows_of_text(cache: BatchCache, layer: int) -> list[Tensor]:
    """What the cache holds of each sequence but its next token, which is written and not counted in."""
    pack = cache.pack([1] * cache.batch, "naive", None)
    return [row[:-1] for _, _, rows in pack.read(layer) for row in rows]


def test_it_grows_by_doubling_and_keeps_what_it_holds() -> None:
    cache, grown = BatchCache(CONFIG, 3, capacity=2), []
    written: list[list[Tensor]] = [[], [], []]
    for step in range(20):
        counts = [50, 0 if step % 3 else 30, 50]
        pack = cache.pack(counts, "naive", None)
        new = torch.randn(2, sum(counts), CONFIG.latent_dim)
        for layer in range(2):
            pack.write(layer, new[layer])
        for own, part in zip(written, new.split(counts, 1), strict=True):
            own.append(part)
        cache.advance(counts)
        grown.append(cache.pool.data.shape[1] // 3)
    assert cache.lengths == [1000, 210, 1000] and sorted(set(grown)) == [1, 2, 4, 8]
    before = cache.pool
    for layer in range(2):
        for got, want in zip(rows_of_text(cache, layer), written, strict=True):
            assert torch.equal(got, torch.cat(want, 1)[layer])
    assert cache.pool is before  # 1000 + 1 fit
    cache.pack([2000, 1, 1], "naive", None)
    assert cache.pool.data.shape[1] == 3 * 24  # more than double at once


def test_rows_are_kept_and_reordered() -> None:
    cache = BatchCache(CONFIG, 3, capacity=4)
    counts = [2, 1, 2]
    pack = cache.pack(counts, "naive", None)
    pack.write(0, torch.tensor([0.0, 0, 1, 2, 2])[:, None].expand(5, CONFIG.latent_dim))
    cache.advance(counts)
    cache.select(torch.tensor([2, 0, 0, 1]))
    assert cache.lengths == [2, 2, 2, 1]
    assert [rows[:, 0].tolist() for rows in rows_of_text(cache, 0)] == [[2, 2], [0, 0], [0, 0], [1]]
    cache.select(torch.tensor([False, True, False, True]))
    assert cache.lengths == [2, 1] and [rows[:, 0].tolist() for rows in rows_of_text(cache, 0)] == [[0, 0], [1]]


def test_alike_sequences_are_read_in_one_piece_where_they_lie() -> None:
    cache = BatchCache(CONFIG, 4)
    pack = cache.pack([3, 3, 3, 3], "naive", None)
    [(chunk, place, rows)] = pack.read(1)
    assert (chunk.tokens, place, rows.shape) == (3, slice(0, 12), (4, 3, CONFIG.latent_dim))
    assert rows.data_ptr() == cache.pool.data[1].data_ptr()
    pieces = list(cache.pack([3, 3, 0, 3], "naive", None).read(0))  # the third is skipped
    assert [(place, len(rows)) for _, place, rows in pieces] == [(slice(0, 6), 2), (slice(6, 9), 1)]
    copied = PackedBatch(cache.pool, [Chunk(3, 0, [0], "naive"), Chunk(3, 0, [2], "naive")])
    assert [len(rows) for _, _, rows in copied.read(0)] == [1, 1]
