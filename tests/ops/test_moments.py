"""Moments of 8 bits: the native step against torch's form, and what the codes keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek.ops import moments, native
from deepseek.ops.moments import BLOCK, Moment, adamw8_, momentum8

HOW: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def randn(count: int, seed: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def steps(count: int) -> tuple[list[Tensor], list[Tensor]]:
    """(weights, scales and directions; codes) after steps along gradients of all sizes, zeros among them."""
    weight = randn(count, 0)
    first, second, momentum = Moment.zeros(weight), Moment.zeros(weight, signed=False), Moment.zeros(weight)
    numbers = []
    for step in range(1, 6):
        gradient = randn(count, step) * torch.logspace(0, -30 if step % 2 else -4, count)
        gradient[: count // 3 * (step % 2)] = 0
        adamw8_(weight, gradient, first, second, step, **HOW)
        numbers.append(momentum8(gradient, momentum, 0.95))
    return [weight, first.scale_B, second.scale_B, momentum.scale_B, *numbers], [
        first.code_BS, second.code_BS, momentum.code_BS]


@pytest.mark.skipif(native.native is None, reason="needs the native kernels")
@pytest.mark.parametrize("count", [1, 15, 256, 257, 5000, 40_003])
def test_native_steps_are_torchs(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tolerance: torch may round a square root otherwise, by which a code in a thousand may be the next one."""
    ours = steps(count)
    monkeypatch.setattr(moments, "threads", lambda: 3)
    assert all(torch.equal(a, b) for each in zip(ours, steps(count), strict=True) for a, b in zip(*each, strict=True))
    monkeypatch.setattr(moments, "runs_native", lambda *_: False)
    for number, other in zip(*(each[0] for each in (ours, steps(count))), strict=True):
        torch.testing.assert_close(number, other, rtol=1e-5, atol=2e-4)
    for code, other in zip(*(each[1] for each in (ours, steps(count))), strict=True):
        apart = (code.int() - other.int()).abs()
        assert int(apart.max()) <= 1 and float(apart.float().mean()) <= 1e-3


def test_first_step_is_adamws() -> None:
    weight, gradient = randn(700, 1), randn(700, 2)
    other = torch.nn.Parameter(weight.clone())
    other.grad = gradient
    torch.optim.AdamW([other], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1).step()
    adamw8_(weight, gradient, Moment.zeros(weight), Moment.zeros(weight, signed=False), 1, **HOW)
    torch.testing.assert_close(weight, other.detach(), rtol=1e-5, atol=1e-6)


def test_moments_stay_near_their_true_values() -> None:
    """A hundred steps: the first moment within 4 % of its block's largest, the second right in the mean, though a step
    moves it by less than a code; a direction of momentum within 2 % of its largest."""
    count = 64 * BLOCK
    weight = torch.zeros(count)
    first, second, momentum = Moment.zeros(weight), Moment.zeros(weight, signed=False), Moment.zeros(weight)
    size = torch.logspace(0, -2, count).view(BLOCK, -1).mT.flatten()  # every block has all sizes
    m, v, mu = torch.zeros(3, count)
    for step in range(1, 101):
        gradient = randn(count, step) * size
        adamw8_(weight, gradient, first, second, step, **HOW)
        ahead = momentum8(gradient, momentum, 0.95)
        m, v, mu = m * 0.9 + gradient * 0.1, v * 0.95 + gradient.square() * 0.05, mu * 0.95 + gradient * 0.05
    c = first.code_BS.float()
    off = (c * c.abs() / 127**2 * first.scale_B[:, None]).flatten() - m
    assert float((off.view(-1, BLOCK).abs().amax(1) / first.scale_B).max()) < 0.04
    kept = ((second.code_BS.float() / 255).pow(4) * second.scale_B[:, None].square()).flatten()
    small = size < 0.02  # codes far below the block's largest
    assert float(kept[small].mean()) == pytest.approx(float(v[small].mean()), rel=0.03)
    wanted = mu * 0.95 + gradient * 0.05
    assert float((ahead - wanted).abs().max()) < 0.02 * float(wanted.abs().max())


def test_what_is_above_zero_stays_above_zero() -> None:
    """A gradient's direction moves a weight by about the learning rate, however small beside its block's largest."""
    weight, gradient = torch.zeros(BLOCK), torch.full((BLOCK,), 1e-6)
    gradient[0] = 1.0
    first, second = Moment.zeros(weight), Moment.zeros(weight, signed=False)
    for step in range(1, 20):
        adamw8_(weight, gradient, first, second, step, **HOW)
    assert int(second.code_BS.min()) >= 1 and float(weight.abs().max()) < 20 * HOW["lr"]


@pytest.mark.parametrize("wrong", ["dtype", "shape", "codes", "signs"])
def test_what_does_not_fit_is_refused(wrong: str) -> None:
    weight = torch.zeros(300)
    gradient = torch.zeros(300, dtype=torch.float64) if wrong == "dtype" else torch.zeros(
        299 if wrong == "shape" else 300)
    first = Moment.zeros(torch.zeros(200) if wrong == "codes" else weight)
    with pytest.raises(ValueError, match="must be"):
        adamw8_(weight, gradient, first, Moment.zeros(weight, signed=wrong == "signs"), 1, **HOW)
