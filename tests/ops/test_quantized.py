"""Operations on quantized weights against their references, and what they promise: a token's bits are its own.

Shape letters: T tokens, K columns, O rows, G groups, H hidden, E experts, B batch, N heads, R latent rank, P rotary
width.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from deepseek import ops
from deepseek.ops.native import native
from deepseek.ops.panels import Bits, matrix_bytes, pack, panel_bytes
from deepseek.ops.quantized import experts_reference, linear_reference, mlp_reference, quantize_rows
from tests.helpers.operations import (
    EXPERTS,
    HIDDEN,
    INNER,
    SHAPES,
    SHARED,
    TOKENS,
    awkward_rows,
    both_widths,
    natively,
    randn,
    random_attention,
    random_experts,
    random_low_rank,
    random_matrix,
    random_mlp,
    random_naive,
    same_bits,
)


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
        assert same_bits(ops.quantized_linear(x_TK, packed, rows, bits=bits), linear_reference(x_TK, w)), tokens


@both_widths
@pytest.mark.parametrize("step", [1.0, 0.0, 1e-42, 1e-30, 1e36, 3e38])
def test_linear_of_awkward_numbers(step: float, bits: Bits) -> None:
    """Zero, denormal, tiny and huge rows under zero, denormal, tiny and huge steps; what overflows, overflows alike."""
    for rows, columns in ((20, 130), (16, 64)):
        w = random_matrix(rows, columns, bits)
        w = w._replace(step_O=w.step_O / w.step_O.max() * step)
        x_TK = awkward_rows(columns)
        y_TO = ops.quantized_linear(x_TK, pack(w), rows, bits=bits)
        assert same_bits(y_TO, linear_reference(x_TK, w))
        assert (y_TO[0] == 0).all() and (y_TO[6] == 0).all()  # zeros, and denormals with no reciprocal
        for t in range(len(x_TK)):
            assert same_bits(ops.quantized_linear(x_TK[t : t + 1], pack(w), rows, bits=bits)[0], y_TO[t]), t


@both_widths
def test_linear_is_near_the_product_of_real_numbers(bits: Bits) -> None:
    w, x_TK = random_matrix(100, 256, bits), randn(9, 256)
    want = x_TK @ w.dequantize().t()
    error = (ops.quantized_linear(x_TK, pack(w), 100, bits=bits) - want).norm() / want.norm()
    assert 1e-4 < error < 1e-2


def test_rows_are_rounded_as_described() -> None:
    """scale = absmax / 127 and q = round(x * (127 / absmax)), each rounded once, against double precision."""
    x_TK = torch.cat((awkward_rows(130), randn(2000, 130)))
    q_TK, scale_T = quantize_rows(x_TK)
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
    y_BTO = ops.quantized_linear(x_BTK, packed, 20, bits=bits)
    assert y_BTO.shape == (2, 5, 20)
    apart = randn(70, 5, 2).transpose(0, 2)
    assert same_bits(ops.quantized_linear(apart, packed, 20, bits=bits),
                     ops.quantized_linear(apart.contiguous(), packed, 20, bits=bits))
    assert same_bits(ops.quantized_linear(x_BTK, packed, 20, bias_O, bits=bits), y_BTO + bias_O)
    assert same_bits(ops.quantized_linear(x_BTK[0, 0], packed, 20, bits=bits), y_BTO[0, 0])
    assert ops.quantized_linear(x_BTK[:, :0], packed, 20, bits=bits).shape == (2, 0, 20)


@both_widths
def test_the_last_panel_of_many_tokens(bits: Bits) -> None:
    """Rows beyond the matrix are written nowhere: results lie densely, whatever 16 and 64 divide."""
    for rows, tokens in itertools.product((1, 15, 17, 31), (63, 64, 65, 129)):
        w, x_TK = random_matrix(rows, 65, bits), randn(tokens, 65)
        assert same_bits(ops.quantized_linear(x_TK, pack(w), rows, bits=bits), linear_reference(x_TK, w))


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
    y_TGO = ops.grouped_quantized_linear(x_TGK, packed, between * panel, stride, rows, bits=bits)
    want = [ops.quantized_linear(x_TGK[:, g].contiguous(), pack(w), rows, bits=bits) for g, w in enumerate(parts)]
    assert same_bits(y_TGO, torch.stack(want, 1))


# ---- gated MLPs and experts ---------------------------------------------------------------------------------------


@both_widths
@pytest.mark.parametrize(("hidden", "inner"), [(64, 64), (100, 40), (33, 130), (16, 1)])
def test_mlp_is_near_the_reference(hidden: int, inner: int, bits: Bits) -> None:
    packed = random_mlp(hidden, inner, bits)
    for tokens in (0, 1, 3, 9, 70):
        x_TH = randn(tokens, hidden) * 3
        if tokens:
            assert_near(ops.quantized_mlp(x_TH, packed, inner, bits=bits), mlp_reference(x_TH, packed, inner, bits))
        assert ops.quantized_mlp(x_TH, packed, inner, bits=bits).shape == (tokens, hidden)


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
    assert same_bits(none.run(), ops.quantized_mlp(case.x_TH, case.shared, SHARED, bits=bits))
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
        return [case.run(), ops.quantized_mlp(case.x_TH, case.shared, SHARED, bits=bits),
                ops.quantized_linear(randn(50, 130), pack(random_matrix(100, 130, bits)), 100, bits=bits),
                ops.plain_linear(randn(60, 36), randn(50, 36)), random_naive(3, 70, bits).run(),
                random_low_rank(50, 36, 200).run(),
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


# ---- weights that are not quantized -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [0, 1, 3, 4, 5, 9, 50])
def test_plain_linear(tokens: int, dtype: torch.dtype, some_threads: int) -> None:
    for rows, columns in ((16, 4), (50, 37), (1, 128), (300, 90)):
        w_OK, x_TK = randn(rows, columns).to(dtype), randn(tokens, columns, seed=1)
        y_TO = ops.plain_linear(x_TK, w_OK)
        torch.testing.assert_close(y_TO, (x_TK.double() @ w_OK.double().t()).float(), rtol=1e-5, atol=1e-5)
        if native is not None:
            alone = [ops.plain_linear(x_TK[t : t + 1], w_OK) for t in range(tokens)]
            assert same_bits(torch.cat([y_TO[:0], *alone]), y_TO)


# ---- numbers that are none ----------------------------------------------------------------------------------------


@both_widths
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("tokens", [2, 20])
def test_a_row_with_a_number_that_is_not_finite_is_nan_and_alone_in_it(bad: float, tokens: int, bits: Bits) -> None:
    """Wherever in the row it stands: nothing is lost, nothing spreads."""
    packed, w = random_mlp(HIDDEN, INNER, bits), random_matrix(20, HIDDEN, bits)
    case = random_experts(tokens, bits)
    good = [ops.quantized_linear(case.x_TH, pack(w), 20, bits=bits),
            ops.quantized_mlp(case.x_TH, packed, INNER, bits=bits), case.run()]
    for place in (0, 15, 16, 50, 95, 96, 99):
        x_TH = case.x_TH.clone()
        x_TH[1, place] = bad
        results = [ops.quantized_linear(x_TH, pack(w), 20, bits=bits),
                   ops.quantized_mlp(x_TH, packed, INNER, bits=bits), case._replace(x_TH=x_TH).run()]
        for now, before in zip(results, good, strict=True):
            assert now[1].isnan().all(), place
            assert same_bits(now[2:], before[2:]) and same_bits(now[0], before[0])
    assert linear_reference(x_TH, w)[1].isnan().all()


