"""INT8 rows: what is asked of a symmetric quantizer."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.quant import int8


@given(rows=st.integers(1, 40), columns=st.integers(1, 200), seed=st.integers(0, 999), exponent=st.integers(-30, 30))
@settings(max_examples=30, deadline=None)
def test_the_error_is_at_most_half_a_step(rows: int, columns: int, seed: int, exponent: int) -> None:
    w_OK = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    q = int8.quantize(w_OK)
    assert q.code_OK.dtype == torch.int8 and q.scale_Ob is None and q.step_O.dtype == torch.float32
    assert bool((q.code_OK.abs().amax(1) == 127).all())  # the range is used whole
    assert torch.allclose(q.step_O, w_OK.abs().amax(1) / 127)
    assert bool(((q.dequantize() - w_OK).abs() <= 0.5001 * q.step_O[:, None]).all())


def test_what_it_can_hold_returns_exactly() -> None:
    codes = torch.arange(-127, 128, dtype=torch.int8).repeat(2, 1)
    q = int8.quantize(codes.float() * torch.tensor([[0.25], [4.0]]))
    assert torch.equal(q.code_OK, codes) and q.step_O.tolist() == [0.25, 4.0]


def test_half_goes_to_even() -> None:
    assert int8.quantize(torch.tensor([[127.0, 0.5, 1.5, -2.5]])).code_OK.tolist() == [[127, 0, 2, -2]]


def test_zeros_stay_zeros() -> None:
    q = int8.quantize(torch.zeros(2, 5))
    assert q.step_O.tolist() == [0, 0] and bool((q.code_OK == 0).all())
