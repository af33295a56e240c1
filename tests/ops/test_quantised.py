"""Operations on quantised weights against their references, and what they promise: a token's bits are its own.

Shape letters: T tokens, K columns, O rows, G groups, H hidden, E experts, B batch, N heads, R latent rank, P rotary
width.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import (
    EXPERTS,
    HIDDEN,
    INNER,
    SHAPES,
    SHARED,
    TOKENS,
    Attention,
    awkward_rows,
    randn,
    random_attention,
    random_experts,
    random_matrix,
    random_mlp,
)
from torch import Tensor

from deepseek import ops
from deepseek.config import ModelConfig
from deepseek.model.gate import choose
from deepseek.model.layers import rotate
from deepseek.ops.native import native
from deepseek.ops.panels import Bits, matrix_bytes, pack, panel_bytes
from deepseek.ops.quantised import (
    experts_reference,
    latent_attention_reference,
    linear_reference,
    mlp_reference,
    quantise_rows,
)

both_widths = pytest.mark.parametrize("bits", [4, 8])
natively = pytest.mark.skipif(native is None, reason="promised by the native kernels alone")


@pytest.fixture(params=[1, 3])
def some_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Also where both are NaN, whose payload is nobody's business."""
    numbers = torch.where(a.isnan(), 0.0, a).view(torch.int32), torch.where(b.isnan(), 0.0, b).view(torch.int32)
    return a.shape == b.shape and torch.equal(*numbers) and torch.equal(a.isnan(), b.isnan())


def assert_near(a: Tensor, b: Tensor) -> None:
    """A rounding of SiLU can move an intermediate number to the next of its 255 steps, seldom and not far."""
    assert a.shape == b.shape
    error = (a - b).abs() / b.abs().max()
    assert error.max() < 5e-3 and (error > 1e-6).float().mean() < 0.05


# ---- linear -------------------------------------------------------------------------------------------------------


@both_widths
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_linear_is_the_reference_bit_by_bit(rows: int, columns: int, bits: Bits, some_threads: int) -> None:
    w = random_matrix(rows, columns, bits)
    packed = pack(w)
    for tokens in TOKENS:
        x_TK = randn(tokens, columns, seed=tokens)
        assert same_bits(ops.quantised_linear(x_TK, packed, rows, bits=bits), linear_reference(x_TK, w)), tokens


@both_widths
@pytest.mark.parametrize("step", [1.0, 0.0, 1e-42, 1e-30, 1e36, 3e38])
def test_linear_of_awkward_numbers(step: float, bits: Bits) -> None:
    """Zero, denormal, tiny and huge rows under zero, denormal, tiny and huge steps; what overflows, overflows alike."""
    for rows, columns in ((20, 130), (16, 64)):
        w = random_matrix(rows, columns, bits)
        w = w._replace(step_O=w.step_O / w.step_O.max() * step)
        x_TK = awkward_rows(columns)
        y_TO = ops.quantised_linear(x_TK, pack(w), rows, bits=bits)
        assert same_bits(y_TO, linear_reference(x_TK, w))
        assert (y_TO[0] == 0).all() and (y_TO[6] == 0).all()  # zeros, and denormals with no reciprocal
        for t in range(len(x_TK)):
            assert same_bits(ops.quantised_linear(x_TK[t : t + 1], pack(w), rows, bits=bits)[0], y_TO[t]), t


@both_widths
def test_linear_is_near_the_product_of_real_numbers(bits: Bits) -> None:
    w, x_TK = random_matrix(100, 256, bits), randn(9, 256)
    want = x_TK @ w.dequantise().t()
    error = (ops.quantised_linear(x_TK, pack(w), 100, bits=bits) - want).norm() / want.norm()
    assert 1e-4 < error < 1e-2


def test_rows_are_rounded_as_described() -> None:
    """scale = absmax / 127 and q = round(x * (127 / absmax)), each rounded once, against double precision."""
    x_TK = torch.cat((awkward_rows(130), randn(2000, 130)))
    q_TK, scale_T = quantise_rows(x_TK)
    peak_T = x_TK.abs().amax(1)
    inverse_T = (127 / peak_T.double()).float()
    want_TK = (x_TK * torch.where(inverse_T < 3e38, inverse_T, 0.0).unsqueeze(1)).round()
    assert torch.equal(q_TK[:, :130], want_TK) and (q_TK[:, 130:] == 0).all()
    assert torch.equal(scale_T, (peak_T.double() / 127).float())
    assert q_TK.abs().max() == 127


@both_widths
def test_linear_of_any_shape_and_layout(bits: Bits) -> None:
    w, bias_O = random_matrix(20, 70, bits), randn(20, seed=3)
    packed, x_BTK = pack(w), randn(2, 5, 70)
    y_BTO = ops.quantised_linear(x_BTK, packed, 20, bits=bits)
    assert y_BTO.shape == (2, 5, 20)
    apart = randn(70, 5, 2).transpose(0, 2)
    assert same_bits(ops.quantised_linear(apart, packed, 20, bits=bits),
                     ops.quantised_linear(apart.contiguous(), packed, 20, bits=bits))
    assert same_bits(ops.quantised_linear(x_BTK, packed, 20, bias_O, bits=bits), y_BTO + bias_O)
    assert same_bits(ops.quantised_linear(x_BTK[0, 0], packed, 20, bits=bits), y_BTO[0, 0])
    assert ops.quantised_linear(x_BTK[:, :0], packed, 20, bits=bits).shape == (2, 0, 20)


@both_widths
def test_the_last_panel_of_many_tokens(bits: Bits) -> None:
    """Rows beyond the matrix are written nowhere: results lie densely, whatever 16 and 64 divide."""
    for rows, tokens in itertools.product((1, 15, 17, 31), (63, 64, 65, 129)):
        w, x_TK = random_matrix(rows, 65, bits), randn(tokens, 65)
        assert same_bits(ops.quantised_linear(x_TK, pack(w), rows, bits=bits), linear_reference(x_TK, w))


# ---- grouped ------------------------------------------------------------------------------------------------------


@both_widths
@pytest.mark.parametrize("tokens", [0, 1, 5, 9, 70])
@pytest.mark.parametrize(("rows", "between"), [(32, 0), (20, 0), (16, 1), (5, 2)])
def test_grouped_linear_is_one_linear_a_group(rows: int, between: int, tokens: int, bits: Bits) -> None:
    """between: panels that lie between two groups and belong to none."""
    x_TGK, panel = randn(tokens, 3, 130), panel_bytes(130, bits)
    parts = [random_matrix(rows, 130, bits, seed) for seed in range(3)]
    packed = torch.cat([torch.cat((torch.full((between * panel,), 255, dtype=torch.uint8), pack(w))) for w in parts])
    stride = between * panel + matrix_bytes(rows, 130, bits)
    y_TGO = ops.grouped_quantised_linear(x_TGK, packed, between * panel, stride, rows, bits=bits)
    want = [ops.quantised_linear(x_TGK[:, g].contiguous(), pack(w), rows, bits=bits) for g, w in enumerate(parts)]
    assert same_bits(y_TGO, torch.stack(want, 1))


# ---- gated MLPs and experts ---------------------------------------------------------------------------------------


@both_widths
@pytest.mark.parametrize(("hidden", "inner"), [(64, 64), (100, 40), (33, 130), (16, 1)])
def test_mlp_is_near_the_reference(hidden: int, inner: int, bits: Bits) -> None:
    packed = random_mlp(hidden, inner, bits)
    for tokens in (0, 1, 3, 9, 70):
        x_TH = randn(tokens, hidden) * 3
        if tokens:
            assert_near(ops.quantised_mlp(x_TH, packed, inner, bits=bits), mlp_reference(x_TH, packed, inner, bits))
        assert ops.quantised_mlp(x_TH, packed, inner, bits=bits).shape == (tokens, hidden)


@both_widths
@pytest.mark.parametrize("tokens", [1, 2, 32, 70])
@pytest.mark.parametrize("shared", [False, True])
def test_experts_are_near_the_reference(shared: bool, tokens: int, bits: Bits) -> None:
    for case in (random_experts(tokens, bits), random_experts(tokens, bits, top=1), random_experts(tokens, bits, top=7),
                 random_experts(tokens, bits, only=EXPERTS - 1)):
        want = experts_reference(case.x_TH, case.index_TK, case.weight_TK, case.experts,
                                 case.shared if shared else None, SHARED if shared else 0)
        assert_near(case.run(shared=shared), want)


@both_widths
def test_experts_that_nobody_visits_and_tokens_that_visit_nobody(bits: Bits) -> None:
    case = random_experts(4, bits)
    none = case._replace(index_TK=case.index_TK[:, :0], weight_TK=case.weight_TK[:, :0])
    assert same_bits(none.run(), ops.quantised_mlp(case.x_TH, case.shared, SHARED, bits=bits))
    assert (none.run(shared=False) == 0).all()
    assert case.run(slice(0)).shape == (0, HIDDEN)


@both_widths
def test_an_expert_chosen_twice_counts_twice(bits: Bits) -> None:
    case = random_experts(3, bits, only=2)
    twice = case._replace(index_TK=case.index_TK.expand(3, 2), weight_TK=case.weight_TK.expand(3, 2))
    torch.testing.assert_close(twice.run(shared=False), 2 * case.run(shared=False))


@natively
@both_widths
@pytest.mark.parametrize("shared", [False, True])
def test_a_token_has_the_same_bits_in_any_company(bits: Bits, shared: bool, some_threads: int) -> None:
    """Alone, in a batch, in another order, beside itself, with NaN next to it."""
    case = random_experts(32, bits)
    together = case.run(shared=shared)
    alone = torch.cat([case.run(slice(t, t + 1), shared=shared) for t in range(32)])
    assert same_bits(alone, together)
    order = torch.randperm(32)
    assert same_bits(case.run(order, shared=shared), together[order])
    for few in (2, 5, 7, 8, 9, 17):
        assert same_bits(case.run(slice(few), shared=shared), together[:few])
    assert same_bits(case.run(torch.zeros(40, dtype=torch.long), shared=shared), together[:1].expand(40, -1))
    case.x_TH[3] = torch.nan
    assert same_bits(torch.cat((case.run(shared=shared)[:3], case.run(shared=shared)[4:])),
                     torch.cat((together[:3], together[4:])))


@natively
@both_widths
def test_the_number_of_threads_is_not_in_the_result(bits: Bits) -> None:
    """Every operation, on one thread and on more."""
    def everything() -> list[Tensor]:
        case, rows = random_experts(50, bits), torch.zeros(2, 9, 36)
        return [case.run(), ops.quantised_mlp(case.x_TH, case.shared, SHARED, bits=bits),
                ops.quantised_linear(randn(50, 130), pack(random_matrix(100, 130, bits)), 100, bits=bits),
                ops.panel_linear(randn(9, 3, 36), ops.pack_panels(randn(3, 50, 36))),
                random_attention(5, 16, 40).run(), random_attention(20, 16, 1).run(),
                ops.prepare_latents(randn(2, 5, 3, 20), randn(2, 5, 36), randn(28), 1e-6, randn(2, 5, 4),
                                    randn(2, 5, 4), True, rows, 3),
                rows, ops.rms_norm(randn(300, 100), randn(100), 1e-6)]

    one = everything()
    try:
        for n in (2, 3, 7):
            torch.set_num_threads(n)
            assert all(map(same_bits, everything(), one))
    finally:
        torch.set_num_threads(1)


# ---- weights that are not quantised -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [0, 1, 3, 4, 5, 9])
def test_panel_linear(tokens: int, dtype: torch.dtype, some_threads: int) -> None:
    for groups, rows, columns in ((1, 16, 4), (3, 50, 36), (2, 1, 128)):
        w_GOK, x_TGK = randn(groups, rows, columns).to(dtype), randn(tokens, groups, columns, seed=1)
        y_TGO = ops.panel_linear(x_TGK, ops.pack_panels(w_GOK))
        want = torch.einsum("tgk,gok->tgo", x_TGK.double(), w_GOK.double()).float()
        assert y_TGO.shape[2] == -(-rows // 16) * 16 and (y_TGO[..., rows:] == 0).all()
        torch.testing.assert_close(y_TGO[..., :rows], want, rtol=1e-5, atol=1e-5)


@natively
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_panel_linear_reads_where_things_lie(dtype: torch.dtype) -> None:
    """A slice of wider rows, as MLA hands over the part of a query without rotation; and a transposed one."""
    packed, wide = ops.pack_panels(randn(3, 50, 36).to(dtype)), randn(9, 3, 44)
    want = ops.panel_linear(wide[..., :36].contiguous(), packed)
    assert same_bits(ops.panel_linear(wide[..., :36], packed), want)
    assert same_bits(ops.panel_linear(wide[..., :36].transpose(0, 1).contiguous().transpose(0, 1), packed), want)
    assert same_bits(torch.cat([ops.panel_linear(wide[t : t + 1, :, :36], packed) for t in range(9)]), want)
    columns_apart = wide[..., :36].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    torch.testing.assert_close(ops.panel_linear(columns_apart, packed), want)


# ---- attention ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 5, 16, 20])
@pytest.mark.parametrize("rank", [16, 48, 12])
@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_latent_attention_is_near_the_reference(heads: int, rank: int, tokens: int, some_threads: int) -> None:
    case = random_attention(heads, rank, tokens)
    torch.testing.assert_close(case.run(), latent_attention_reference(*case, 0.2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("first", "past"), [(0, 0), (0, 126), (0, 127), (0, 128), (1, 128), (5, 5), (9, 3), (128, 299),
                                             (299, 299), (0, 299)])
def test_spans_of_every_length(first: int, past: int) -> None:
    """Blocks of 128 keys, whole and broken, counted from the first visible one; a query before it sees itself."""
    case = random_attention(3, 16, 1, batch=1)._replace(first_B=torch.tensor([first]), past_B=torch.tensor([past]))
    want = latent_attention_reference(*case, 0.2)
    torch.testing.assert_close(case.run(), want, rtol=1e-4, atol=1e-5)
    if first >= past:
        torch.testing.assert_close(case.run(), case.cache[:, past, :16].expand(1, 1, 3, 16))


@pytest.mark.parametrize("rank", [16, 12])
def test_what_a_query_may_not_see_is_not_read(rank: int) -> None:
    """NaN everywhere but in the visible rows; and queries of padding, which see themselves, are finite."""
    case = random_attention(5, rank, 4)
    cache = torch.full_like(case.cache, torch.nan)
    for b, (first, past) in enumerate(zip(case.first_B.tolist(), case.past_B.tolist(), strict=True)):
        cache[b, min(first, past) : past + 4] = case.cache[b, min(first, past) : past + 4]
    if native is not None and rank == 16:
        assert same_bits(case._replace(cache=cache).run(), case.run())
    assert case.run().isfinite().all()


@natively
@pytest.mark.parametrize("heads", [5, 20])
def test_a_query_has_the_same_bits_in_any_company(heads: int, some_threads: int) -> None:
    """Alone, in a batch, in chunks of every length, behind padding on the left."""
    case = random_attention(heads, 32, 40)
    whole = case.run()
    for b in range(3):
        alone = Attention(*(t[b : b + 1] for t in case))
        assert same_bits(alone.run()[0], whole[b])
        first = int(case.first_B[b])
        if first <= case.past_B[b]:  # what lies before the first visible row may as well not be there
            moved = alone._replace(cache=alone.cache[:, first:], first_B=torch.zeros(1, dtype=torch.long),
                                   past_B=alone.past_B - first)
            assert same_bits(moved.run()[0], whole[b])
    for chunk in (1, 7, 39):
        parts = [Attention(case.q_latent[:, t : t + chunk].contiguous(), case.q_rope[:, t : t + chunk].contiguous(),
                           case.cache, case.first_B, case.past_B + t).run() for t in range(0, 40, chunk)]
        assert same_bits(torch.cat(parts, 1), whole)


@natively
def test_a_cache_within_a_larger_one() -> None:
    """Rows of one sequence lie together, sequences anywhere; other layouts and dtypes take the reference."""
    case = random_attention(5, 16, 3)
    large = randn(3, 500, 24)
    large[:, :300] = case.cache
    assert same_bits(case._replace(cache=large[:, :300]).run(), case.run())
    for other in (case.cache.transpose(0, 1).contiguous().transpose(0, 1), case.cache.double()):
        torch.testing.assert_close(case._replace(cache=other).run(), case.run(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize(("nope", "rope", "rank"), [(12, 8, 28), (0, 2, 16), (16, 64, 33)])
def test_prepare_latents(nope: int, rope: int, rank: int, per_sequence: bool, interleave: bool,
                         some_threads: int) -> None:
    q_BTND, kv_BTC, norm_R = randn(2, 5, 3, nope + rope), randn(2, 5, rank + rope, seed=1), randn(rank, seed=2)
    angle = randn(2 if per_sequence else 1, 5, rope // 2, seed=3)
    cos, sin = angle.cos() * 1.3, angle.sin() * 1.3
    cache = randn(2, 20, rank + rope, seed=4)
    rows, before = cache[:, :9], cache.clone()
    q_rope = ops.prepare_latents(q_BTND, kv_BTC, norm_R, 1e-6, cos, sin, interleave, rows, 4)
    torch.testing.assert_close(q_rope, rotate(q_BTND[..., nope:], cos, sin, interleave), rtol=1e-5, atol=1e-6)
    latent = ops.rms_norm(kv_BTC[..., :rank], norm_R, 1e-6)
    key = rotate(kv_BTC[:, :, None, rank:], cos, sin, interleave)
    torch.testing.assert_close(cache[:, 4:9], torch.cat((latent, key[:, :, 0]), -1), rtol=1e-5, atol=1e-6)
    assert torch.equal(cache[:, :4], before[:, :4]) and torch.equal(cache[:, 9:], before[:, 9:])
    apart = torch.zeros(9, 2, rank + rope).transpose(0, 1)  # not as the kernels need it: the reference
    again = ops.prepare_latents(q_BTND, kv_BTC, norm_R.bfloat16(), 1e-6, cos, sin, interleave, apart, 4)
    torch.testing.assert_close(again, q_rope, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(apart[:, 4:], cache[:, 4:9], rtol=1e-2, atol=1e-2)


# ---- the gate -----------------------------------------------------------------------------------------------------

GATES: dict[str, dict[str, Any]] = {
    "V3": dict(n_routed_experts=32, n_group=8, topk_group=4, num_experts_per_tok=6, routed_scaling_factor=2.5),
    "V3, the real one": dict(n_routed_experts=256, n_group=8, topk_group=4, num_experts_per_tok=8),
    "V3, one group": dict(n_routed_experts=20, n_group=1, topk_group=1, num_experts_per_tok=5),
    "V3, every group": dict(n_routed_experts=16, n_group=4, topk_group=4, num_experts_per_tok=4),
    "V3, all that is left": dict(n_routed_experts=16, n_group=8, topk_group=2, num_experts_per_tok=4),
    "V3, top 1": dict(n_routed_experts=16, n_group=4, topk_group=1, num_experts_per_tok=1),
    "V3, not normalised": dict(n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=3,
                               norm_topk_prob=False),
    "V2 greedy": dict(model_type="deepseek_v2", topk_method="greedy", scoring_func="softmax", n_routed_experts=24,
                      n_group=1, topk_group=1, num_experts_per_tok=6, norm_topk_prob=False),
    "V2 groups": dict(model_type="deepseek_v2", topk_method="group_limited_greedy", scoring_func="softmax",
                      n_routed_experts=40, n_group=8, topk_group=3, num_experts_per_tok=6, norm_topk_prob=False,
                      routed_scaling_factor=16.0),
    "V2 normalised": dict(model_type="deepseek_v2", topk_method="group_limited_greedy", scoring_func="softmax",
                          n_routed_experts=40, n_group=8, topk_group=3, num_experts_per_tok=6, norm_topk_prob=True,
                          routed_scaling_factor=16.0),
    "V2 normalised, top 1": dict(model_type="deepseek_v2", topk_method="greedy", scoring_func="softmax",
                                 n_routed_experts=8, n_group=1, topk_group=1, num_experts_per_tok=1,
                                 norm_topk_prob=True),
}


def gate_arguments(config: ModelConfig) -> dict[str, Any]:
    """What quant/fused.py hands over."""
    limited = config.n_group > 1 and config.topk_group < config.n_group and config.topk_method != "greedy"
    sigmoid = config.scoring_func == "sigmoid"
    return dict(groups=config.n_group, kept_groups=config.topk_group, top=config.num_experts_per_tok,
                group_best=(2 if config.topk_method == "noaux_tc" else 1) if limited else 0, sigmoid=sigmoid,
                normalise=config.norm_topk_prob and (sigmoid or config.num_experts_per_tok > 1), scale_anyway=sigmoid,
                scale=config.routed_scaling_factor)


def chosen(scores_TE: Tensor, config: ModelConfig, bias_E: Tensor | None) -> Tensor:
    """The K best by stable sorting alone, so that ties go to the lower index."""
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if best := gate_arguments(config)["group_best"]:
        grouped_TGE = choice_TE.unflatten(-1, (config.n_group, -1))
        group_TG = grouped_TGE.sort(-1, descending=True)[0][..., :best].sum(-1)
        rank_TG = group_TG.argsort(dim=-1, descending=True, stable=True)
        out_TG = torch.ones(rank_TG.shape, dtype=torch.bool).scatter_(1, rank_TG[:, : config.topk_group], False)
        choice_TE = grouped_TGE.masked_fill(out_TG.unsqueeze(-1), -torch.inf).flatten(-2)
    return choice_TE.argsort(dim=-1, descending=True, stable=True)[:, : config.num_experts_per_tok]


@natively
@pytest.mark.parametrize("changes", GATES.values(), ids=GATES.keys())
@pytest.mark.parametrize("kind", ["random", "ties", "all equal", "wide"])
def test_choices_are_those_of_the_model(changes: dict[str, Any], kind: str, tiny_config: Callable,
                                        some_threads: int) -> None:
    """Exactly, ties too: those go to the lower index. Weights up to rounding."""
    config = tiny_config(**changes)
    experts = config.n_routed_experts
    levels = torch.tensor([-1.7, -0.4, 0.3, 0.9, 2.2])  # few enough for ties, too odd for sums to meet by chance
    logits_TE = {"random": randn(500, experts), "all equal": torch.full((3, experts), 0.7),
                 "ties": levels[torch.randint(0, 5, (500, experts))], "wide": randn(500, experts) * 30}[kind]
    bias_E = None if config.topk_method != "noaux_tc" else {
        "ties": torch.tensor([0.0, 0.0625])[torch.arange(experts) % 2], "all equal": torch.zeros(experts)}.get(
        kind, randn(experts, seed=5) * 0.1)
    route = choose(logits_TE, config, bias_E)
    index_TK, weight_TK, scores_TE = ops.choose_experts(logits_TE, bias_E, **gate_arguments(config))
    torch.testing.assert_close(scores_TE, route.scores_TE, rtol=1e-5, atol=1e-7)
    assert torch.equal(index_TK, chosen(scores_TE, config, bias_E))
    same_T = (index_TK == route.index_TK).all(-1)
    if kind != "wide":  # there scores meet at 0 and 1, and one rounding decides
        assert same_T.all()
    assert same_T.float().mean() > 0.5
    torch.testing.assert_close(weight_TK[same_T], route.weight_TK[same_T], rtol=1e-5, atol=1e-7)


# ---- numbers that are none ----------------------------------------------------------------------------------------


@both_widths
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("tokens", [2, 20])
def test_a_row_with_a_number_that_is_not_finite_is_nan_and_alone_in_it(bad: float, tokens: int, bits: Bits) -> None:
    """Wherever in the row it stands: nothing is lost, nothing spreads."""
    packed, w = random_mlp(HIDDEN, INNER, bits), random_matrix(20, HIDDEN, bits)
    case = random_experts(tokens, bits)
    good = [ops.quantised_linear(case.x_TH, pack(w), 20, bits=bits),
            ops.quantised_mlp(case.x_TH, packed, INNER, bits=bits), case.run()]
    for place in (0, 15, 16, 50, 95, 96, 99):
        x_TH = case.x_TH.clone()
        x_TH[1, place] = bad
        results = [ops.quantised_linear(x_TH, pack(w), 20, bits=bits),
                   ops.quantised_mlp(x_TH, packed, INNER, bits=bits), case._replace(x_TH=x_TH).run()]
        for now, before in zip(results, good, strict=True):
            assert now[1].isnan().all(), place
            assert same_bits(now[2:], before[2:]) and same_bits(now[0], before[0])
    assert linear_reference(x_TH, w)[1].isnan().all()


@pytest.mark.parametrize("rank", [16, 12])
def test_nan_in_attention_stays_with_its_query(rank: int) -> None:
    case = random_attention(5, rank, 3)
    good = case.run()
    case.q_latent[1, 2, 3, 0] = torch.nan
    now = case.run()
    assert now[1, 2, 3].isnan().all()
    good[1, 2, 3] = now[1, 2, 3] = 0
    torch.testing.assert_close(now, good)


@natively
def test_a_gate_of_nan_still_names_experts() -> None:
    logits_TE = randn(4, 16)
    logits_TE[1], logits_TE[2, 3] = torch.nan, torch.nan
    for sigmoid in (False, True):
        index_TK, weight_TK, _ = ops.choose_experts(
            logits_TE, None, groups=4, kept_groups=2, top=4, group_best=2, sigmoid=sigmoid, normalise=True,
            scale_anyway=True, scale=1.0)
        assert ((index_TK >= 0) & (index_TK < 16)).all() and weight_TK[1].isnan().all()
        assert all(len(set(row)) == 4 for row in index_TK.tolist())


# ---- errors -------------------------------------------------------------------------------------------------------

X, W = randn(3, 100), pack(random_matrix(20, 100, 4))
MLP = random_mlp(HIDDEN, INNER, 4)
TABLE = ops.ExpertTable([MLP, MLP], HIDDEN, INNER)
INDEX, WEIGHT = torch.tensor([[0], [1], [1]]), torch.ones(3, 1)
PANELS, X3 = ops.pack_panels(randn(3, 20, 8)), randn(2, 3, 8)
LATENTS: dict[str, Any] = dict(q_BTND=randn(2, 5, 3, 12), kv_BTC=randn(2, 5, 24), norm_R=randn(16), eps=1e-6,
                               cos_BTP=randn(1, 5, 4), sin_BTP=randn(1, 5, 4), interleave=True,
                               rows_BSC=torch.zeros(2, 9, 24), past=4)
GATE: dict[str, Any] = dict(groups=4, kept_groups=2, top=4, group_best=2, sigmoid=True, normalise=True,
                            scale_anyway=True, scale=1.0)


def off_by(n: int, packed: Tensor) -> Tensor:
    """A copy that begins n bytes after a multiple of 64."""
    room = torch.zeros(len(packed) + 128, dtype=torch.uint8)
    begin = -room.data_ptr() % 64 + n
    room[begin : begin + len(packed)] = packed
    return room[begin : begin + len(packed)]


def experts(x: Tensor = X, index: Tensor = INDEX, weight: Tensor = WEIGHT, table: Any = TABLE, inner: int = INNER,
            **options: Any) -> Tensor:
    return ops.quantised_experts(x, index, weight, table, inner, **options)


def attention(**changes: Any) -> Tensor:
    return random_attention(5, 16, 3)._replace(**changes).run()


def latents(**changes: Any) -> Tensor:
    return ops.prepare_latents(*(LATENTS | changes).values())


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "linear: x of another dtype": (
        lambda: ops.quantised_linear(X.bfloat16(), W, 20), "x must be float32, got torch.bfloat16"),
    "linear: a gradient": (lambda: ops.quantised_linear(X.clone().requires_grad_(), W, 20), "x requires a gradient"),
    "linear: weights of another dtype": (
        lambda: ops.quantised_linear(X, W.view(torch.int8), 20),
        f"packed must be {len(W)} contiguous bytes (uint8), got {len(W)} of torch.int8"),
    "linear: too few bytes": (
        lambda: ops.quantised_linear(X, W[:-64], 20),
        f"packed must be {len(W)} contiguous bytes (uint8), got {len(W) - 64} of torch.uint8"),
    "linear: more columns": (lambda: ops.quantised_linear(randn(3, 129), W, 20), "packed must be"),
    "linear: bytes apart": (lambda: ops.quantised_linear(X, torch.stack((W, W), 1)[:, 0], 20), "packed must be"),
    "linear: misaligned": (
        lambda: ops.quantised_linear(X, off_by(1, W), 20),
        "packed must begin at a multiple of 64 bytes, begins 1 after one"),
    "mlp: x of another dtype": (lambda: ops.quantised_mlp(X.double(), MLP, INNER), "x must be float32"),
    "mlp: too few bytes": (
        lambda: ops.quantised_mlp(X, MLP[:-1], INNER), f"packed must be {len(MLP)} contiguous bytes"),
    "mlp: misaligned": (lambda: ops.quantised_mlp(X, off_by(32, MLP), INNER), "begins 32 after one"),
    "experts: x of another dtype": (lambda: experts(X.half()), "x must be float32"),
    "experts: a gradient": (lambda: experts(X.clone().requires_grad_()), "x requires a gradient"),
    "experts: an expert too short": (
        lambda: experts(table=[MLP, MLP[:-64]]), f"expert 1 must be {len(MLP)} contiguous bytes (uint8), got"),
    "experts: an expert misaligned": (
        lambda: experts(table=[off_by(4, MLP), MLP]), "expert 0 must begin at a multiple"),
    "experts: a table for others": (
        lambda: experts(inner=INNER - 1),
        "experts are for hidden, intermediate, bits (100, 40, 4), asked for (100, 39, 4)"),
    "experts: a table of other bits": (lambda: experts(bits=8), "asked for (100, 40, 8)"),
    "experts: an index too large": (lambda: experts(index=INDEX + 1), "index holds 2: must lie in 0..1"),
    "experts: an index too small": (lambda: experts(index=INDEX - 1), "index holds -1: must lie in 0..1"),
    "experts: index of another dtype": (lambda: experts(index=INDEX.int()), "index must be int64 [3, K]"),
    "experts: an index for others": (lambda: experts(index=INDEX[:2], weight=WEIGHT[:2]), "index must be int64 [3, K]"),
    "experts: weights of another shape": (lambda: experts(weight=WEIGHT[:2]), "beside weight of the same shape"),
    "experts: shared too short": (lambda: experts(shared=MLP[:64], shared_inner=INNER), "shared must be"),
    "grouped: too few bytes": (
        lambda: ops.grouped_quantised_linear(X.view(3, 1, 100), W, 64, 0, 20),
        f"packed must be {len(W) + 64} contiguous"),
    "grouped: misaligned": (
        lambda: ops.grouped_quantised_linear(X.view(3, 1, 100), W, 16, 0, 5), "multiples of 64 bytes, got 16 and 0"),
    "grouped: a stride between panels": (
        lambda: ops.grouped_quantised_linear(X.view(3, 2, 50), W, 0, 100, 5), "multiples of 64 bytes, got 0 and 100"),
    "grouped: before the beginning": (
        lambda: ops.grouped_quantised_linear(X.view(3, 1, 100), W, -64, 0, 5), "got -64 and 0"),
    "grouped: x of another dtype": (
        lambda: ops.grouped_quantised_linear(X.view(3, 1, 100).half(), W, 0, 0, 20), "x must be float32"),
    "panels: columns": (lambda: ops.pack_panels(randn(1, 16, 6)), "columns a multiple of 4"),
    "panels: dtype": (lambda: ops.pack_panels(randn(1, 16, 8).half()), "must be bfloat16 or float32"),
    "panels: x of another dtype": (lambda: ops.panel_linear(X3.bfloat16(), PANELS), "x must be float32"),
    "panels: other groups": (lambda: ops.panel_linear(X3[:, :2], PANELS), "weights must be [2, P, 8, 16]"),
    "panels: other columns": (lambda: ops.panel_linear(X3[..., :4], PANELS), "weights must be [3, P, 4, 16]"),
    "panels: weights of another dtype": (lambda: ops.panel_linear(X3, PANELS.half()), "got torch.float16"),
    "panels: columns that four do not divide": (
        lambda: ops.panel_linear(X3[..., :6], PANELS[:, :, :6].contiguous()), "columns a multiple of 4"),
    "attention: query of another dtype": (
        lambda: attention(q_latent=randn(3, 3, 5, 16).half()), "q_latent must be float32"),
    "attention: rotary query of another dtype": (
        lambda: attention(q_rope=randn(3, 3, 5, 8).double()), "q_rope must be"),
    "attention: other heads": (
        lambda: attention(q_rope=randn(3, 3, 4, 8)), "shapes do not fit: q_latent [3, 3, 5, 16]"),
    "attention: another cache": (lambda: attention(cache=randn(3, 300, 25)), "cache [3, 300, 25]"),
    "attention: another batch": (lambda: attention(cache=randn(2, 300, 24)), "cache [2, 300, 24]"),
    "attention: positions of another dtype": (lambda: attention(past_B=torch.zeros(3).int()), "must be int64 [3]"),
    "attention: too few positions": (lambda: attention(first_B=torch.zeros(2).long()), "must be int64 [3]"),
    "attention: beyond the cache": (lambda: attention(past_B=torch.tensor([0, 298, 0])), "past + 3 <= 300, got"),
    "attention: before the cache": (lambda: attention(first_B=torch.tensor([0, -1, 0])), "first >= 0"),
    "attention: a past before the cache": (lambda: attention(past_B=torch.tensor([0, -1, 0])), "past >= 0"),
    "latents: q of another dtype": (lambda: latents(q_BTND=randn(2, 5, 3, 12).half()), "q must be float32"),
    "latents: kv of another dtype": (lambda: latents(kv_BTC=randn(2, 5, 24).bfloat16()), "kv must be float32"),
    "latents: rank": (lambda: latents(norm_R=randn(15)), "shapes do not fit"),
    "latents: other rows": (lambda: latents(rows_BSC=torch.zeros(2, 9, 25)), "rows [2, 9, 25]"),
    "latents: rows of another dtype": (lambda: latents(rows_BSC=torch.zeros(2, 9, 24).half()), "rows must be float32"),
    "latents: beyond the rows": (lambda: latents(past=5), "rows must be float32 and hold 5 + 5"),
    "latents: before the rows": (lambda: latents(past=-1), "rows must be float32 and hold -1 + 5"),
    "latents: angles of another length": (lambda: latents(cos_BTP=randn(1, 4, 4)), "cos and sin must be [2 or 1, 5, "),
    "latents: angles of another batch": (
        lambda: latents(cos_BTP=randn(3, 5, 4), sin_BTP=randn(3, 5, 4)), "got [3, 5, 4] and [3, 5, 4]"),
    "latents: sin is not cos": (lambda: latents(sin_BTP=randn(1, 5, 3)), "got [1, 5, 4] and [1, 5, 3]"),
    "latents: q too narrow": (lambda: latents(q_BTND=randn(2, 5, 3, 7)), "at most 3"),
    "norm: weights of another width": (lambda: ops.rms_norm(X, randn(16), 1e-6), "weights must be [100], got [16]"),
    "gate: logits of another dtype": (lambda: ops.choose_experts(randn(3, 16).half(), None, **GATE), "must be float32"),
    "gate: bias of another dtype": (
        lambda: ops.choose_experts(randn(3, 16), torch.zeros(16).bfloat16(), **GATE), "must be float32"),
    "gate: bias of others": (
        lambda: ops.choose_experts(randn(3, 16), torch.zeros(15), **GATE), "one bias an expert (16)"),
    "gate: more than are left": (
        lambda: ops.choose_experts(randn(3, 16), None, **(GATE | {"top": 9})), "9 of 16 experts in 2 of 4 groups"),
    "gate: groups that do not divide": (
        lambda: ops.choose_experts(randn(3, 15), None, **GATE), "4 of 15 experts in 2 of 4 groups"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_clear_error(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
