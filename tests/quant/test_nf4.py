"""NF4 beside bitsandbytes: the same codes bit for bit, and errors that are no larger."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepseek.ops.panels import LEVELS, ZERO
from deepseek.quant import nf4

DISTRIBUTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "normal, as BF16": lambda x: x.bfloat16().float(),
    "all of one sign": lambda x: x.abs(),
    "heavy tails": lambda x: x**5,
    "light tails": lambda x: x.erf(),
    "tiny": lambda x: x * 1e-30,
    "huge": lambda x: x * 1e30,
    "few values": lambda x: x.round(),
    "sparse": lambda x: x * (x > 1.5),
    "zeros": lambda x: x * 0,
    "one value": lambda x: x * 0 - 3,
    "equal maxima": lambda x: x.clamp(-1, 1),
    "rows of all sizes": lambda x: x * torch.logspace(-6, 6, len(x))[:, None],
    "blocks of all sizes": lambda x: x * torch.logspace(-3, 3, x.shape[1] // 64).repeat_interleave(64),
}
every_distribution = pytest.mark.parametrize("make", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS.keys())


def bitsandbytes(w_OK: Tensor, nested: bool = False) -> tuple[Tensor, Tensor]:
    """(codes, dequantized values)."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs the test extra (bitsandbytes)")
    packed, state = functional.quantize_4bit(w_OK, blocksize=64, quant_type="nf4", compress_statistics=nested)
    codes = torch.stack((packed.flatten() >> 4, packed.flatten() & 15), 1).view(w_OK.shape)
    return codes, functional.dequantize_4bit(packed, state)


@every_distribution
@pytest.mark.parametrize("shape", [(1, 64), (3, 128), (33, 192), (64, 2048)])
def test_codes_are_those_of_bitsandbytes(make: Callable[[Tensor], Tensor], shape: tuple[int, int]) -> None:
    w_OK = make(torch.randn(shape))
    assert torch.equal(nf4.quantize(w_OK).code_OK, bitsandbytes(w_OK)[0])


def test_codes_at_the_thresholds_are_those_of_bitsandbytes() -> None:
    """Levels, midpoints, and their neighbours in float32, under maxima that round the quotient in every way."""
    level = torch.tensor(nf4.CODEBOOK)
    middle = (level[:-1] + level[1:]) / 2
    points = torch.cat((level, middle, *(torch.nextafter(middle, torch.tensor(side)) for side in (-2.0, 2.0))))
    row = torch.cat((points, torch.zeros(-len(points) % 63)))
    blocks = torch.cat((row.view(-1, 63), torch.ones(len(row) // 63, 1)), 1).flatten()  # each with its maximum
    w_OK = blocks * torch.cat((torch.tensor([1.0, 2.0, 3.0, 1 / 3]), torch.rand(60) + 0.1)).unsqueeze(1)
    assert torch.equal(nf4.quantize(w_OK).code_OK, bitsandbytes(w_OK)[0])


@every_distribution
def test_the_squared_error_is_no_larger_than_theirs(make: Callable[[Tensor], Tensor]) -> None:
    """With their nested scales, which take as many bits. Where they are exact, the integer levels may show."""
    w_OK = make(torch.randn(64, 1024)).double()
    ours, theirs = nf4.quantize(w_OK.float()).dequantize().double(), bitsandbytes(w_OK.float(), nested=True)[1].double()
    size = w_OK.square().sum()
    assert (ours - w_OK).square().sum() <= max((theirs - w_OK).square().sum(), 4e-6 * size)


@given(rows=st.integers(1, 40), columns=st.integers(1, 200), seed=st.integers(0, 999), exponent=st.integers(-30, 30))
@settings(max_examples=30, deadline=None)
def test_the_error_of_a_round_trip_is_bounded(rows: int, columns: int, seed: int, exponent: int) -> None:
    """Half of the widest gap (-1 to -0.696) is 0.152 of a block's largest weight, the fit moves a level by less than
    that again, and the 8-bit scale is off by at most half a step of the row."""
    w_OK = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    q = nf4.quantize(w_OK)
    assert q.code_OK.dtype == torch.uint8 and q.code_OK.shape == w_OK.shape and int(q.code_OK.max()) < 16
    assert q.scale_Ob is not None and q.scale_Ob.dtype == torch.uint8
    assert q.scale_Ob.shape == (rows, -(-columns // 64)) and q.step_O.dtype == torch.float32
    assert bool((q.scale_Ob.amax(1) == 255).all())  # the range is used whole
    error_OK = (q.dequantize() - w_OK).abs()
    for b, start in enumerate(range(0, columns, 64)):
        block = slice(start, start + 64)
        largest_O1 = w_OK[:, block].abs().amax(1, keepdim=True)
        assert bool((error_OK[:, block] <= 0.31 * largest_O1 + 64 * q.step_O[:, None]).all()), b
    assert error_OK.norm() <= 0.2 * w_OK.norm()


def test_the_scale_is_the_best_one_for_its_codes() -> None:
    w_OK = torch.randn(16, 256)
    q = nf4.quantize(w_OK)
    assert q.scale_Ob is not None
    best = (q.dequantize() - w_OK).square().unflatten(1, (-1, 64)).sum(-1)
    for other in (-1, 1):
        scale = (q.scale_Ob.int() + other).clamp(0, 255).to(torch.uint8)
        worse = (q._replace(scale_Ob=scale).dequantize() - w_OK).square().unflatten(1, (-1, 64)).sum(-1)
        assert bool((worse >= best - 1e-6).all())


def test_a_short_last_block_stands_alone() -> None:
    w_OK = torch.randn(5, 100)
    q, alone = nf4.quantize(w_OK), nf4.quantize(w_OK[:, 64:])
    assert torch.equal(q.code_OK[:, 64:], alone.code_OK)


def test_rows_do_not_depend_on_each_other() -> None:
    w_OK = torch.randn(7, 130)
    whole = nf4.quantize(w_OK)
    for r in range(7):
        for a, b in zip(nf4.quantize(w_OK[r : r + 1]), whole, strict=True):
            assert torch.equal(a[0], b[r])


def test_zeros_stay_zeros() -> None:
    w_OK = torch.randn(3, 192)
    w_OK[1], w_OK[:, 64:128] = 0, 0
    q = nf4.quantize(w_OK)
    assert q.scale_Ob is not None
    assert q.step_O[1] == 0 and bool((q.code_OK[1] == ZERO).all()) and bool((q.scale_Ob[:, 1] == 0).all())
    assert bool((q.dequantize()[w_OK == 0] == 0).all())


def test_levels_are_the_codebook_in_127ths() -> None:
    assert [round(127 * level) for level in nf4.CODEBOOK] == list(LEVELS)
