"""Moments of 8 bits: the native step against torch's form, and what the codes keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek.ops import moments, native
from deepseek.ops.moments import BLOCK, Moment, adamw8_, first_of, hashed, momentum8, moved_, rounded, second_of

HOW: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def randn(count: int, seed: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def steps(count: int, dtype: torch.dtype) -> list[Tensor]:
    """Weights, moments and directions after steps along gradients of all sizes, zeros among them."""
    weight, turned = randn(count, 0).to(dtype), randn(count, 0).bfloat16()
    first, second, momentum = Moment.zeros(weight), Moment.zeros(weight), Moment.zeros(weight, torch.int8)
    directions = []
    for step in range(1, 6):
        gradient = randn(count, step) * torch.logspace(0, -30 if step % 2 else -4, count)
        gradient[: count // 3 * (step % 2)] = 0
        adamw8_(weight, gradient.to(dtype), first, second, step, seed=step, **HOW)
        directions.append(momentum8(gradient, momentum, 0.95))
        moved_(turned, directions[-1], step, decay=0.999, size=0.02)
    return [weight, turned, *first, *second, *momentum, *directions]


@pytest.mark.skipif(native.native is None, reason="needs the native kernels")
@pytest.mark.parametrize("count", [1, 15, 256, 257, 5000, 40_003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_steps_are_torchs(count: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = steps(count, dtype)
    monkeypatch.setattr(moments, "threads", lambda: 3)
    threaded = steps(count, dtype)
    monkeypatch.setattr(moments, "runs_native", lambda *_: False)
    for ours_, *others in zip(ours, threaded, steps(count, dtype), strict=True):
        assert all(torch.equal(ours_, other) for other in others)


def test_first_step_is_adamws() -> None:
    weight, gradient = randn(700, 1), randn(700, 2)
    other = torch.nn.Parameter(weight.clone())
    other.grad = gradient
    torch.optim.AdamW([other], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1).step()
    adamw8_(weight, gradient, Moment.zeros(weight), Moment.zeros(weight), 1, **HOW)
    torch.testing.assert_close(weight, other.detach(), rtol=1e-5, atol=1e-6)


def test_moments_stay_near_their_true_values() -> None:
    """A hundred steps: the first moment within 7 % of its block's largest and 4 % in the mean square, the second right
    in the mean, though a step moves it by less than a code; a direction of momentum within 2 % of its largest."""
    count = 64 * BLOCK
    weight = torch.zeros(count)
    first, second, momentum = Moment.zeros(weight), Moment.zeros(weight), Moment.zeros(weight, torch.int8)
    size = torch.logspace(0, -2, count).view(BLOCK, -1).mT.flatten()  # every block has all sizes
    m, v, mu = torch.zeros(3, count)
    for step in range(1, 101):
        gradient = randn(count, step) * size
        adamw8_(weight, gradient, first, second, step, **HOW)
        ahead = momentum8(gradient, momentum, 0.95)
        m, v, mu = m * 0.9 + gradient * 0.1, v * 0.95 + gradient.square() * 0.05, mu * 0.95 + gradient * 0.05
    off = (first_of(first) - m.view(-1, BLOCK)).abs()
    assert float((off.amax(1) / first.scale_B).max()) < 0.07 and float(off.norm() / m.norm()) < 0.04
    kept = second_of(second).flatten()
    small = size < 0.02  # codes far below the block's largest
    assert float(kept[small].mean()) == pytest.approx(float(v[small].mean()), rel=0.03)
    wanted = mu * 0.95 + gradient * 0.05
    assert float((ahead - wanted).abs().max()) < 0.02 * float(wanted.abs().max())


def test_rounding_by_chance_keeps_the_mean() -> None:
    """To a neighbour of BF16, and in the mean of many draws of a number to the number itself; exact numbers stay."""
    x = randn(500, 0)
    found = torch.stack([rounded(x, hashed(seed)) for seed in range(4000)]).double()
    step = 2.0 ** (x.abs().log2().floor() - 7)
    assert bool(((found - x).abs() < step).all())
    assert float(((found.mean(0) - x) / step).abs().max()) < 0.5 / 4000**0.5 * 4.5
    assert torch.equal(rounded(x.bfloat16().float(), 7), x.bfloat16())


def test_draws_of_places_and_steps_do_not_go_together() -> None:
    up = torch.stack([rounded(torch.full((4096,), 1 + 2.0**-8), hashed(seed)) > 1 for seed in range(64)]).double() - 0.5
    for a, b in ((up[1:], up[:-1]), (up[:, 1:], up[:, :-1]), (up[:, 256:], up[:, :-256])):
        assert abs(float((4 * a * b).mean())) < 5 / a.numel() ** 0.5
    assert float((up.mean(1) * 2).abs().max()) < 5 / 4096**0.5


def test_no_second_moment_is_zero() -> None:
    """A weight moves by the learning rate at most, however small its gradient beside its block's largest."""
    weight, gradient = torch.zeros(BLOCK), torch.full((BLOCK,), 1e-6)
    gradient[0] = 1.0
    first, second = Moment.zeros(weight), Moment.zeros(weight)
    for step in range(1, 20):
        adamw8_(weight, gradient, first, second, step, **HOW)
    assert float(second_of(second).min()) > 0 and float(weight.abs().max()) < 20 * HOW["lr"]


@pytest.mark.parametrize("wrong", ["dtype", "shape", "codes", "signs"])
def test_what_does_not_fit_is_refused(wrong: str) -> None:
    weight = torch.zeros(300)
    gradient = torch.zeros(300, dtype=torch.float64) if wrong == "dtype" else torch.zeros(
        299 if wrong == "shape" else 300)
    first = Moment.zeros(torch.zeros(200) if wrong == "codes" else weight)
    second = Moment.zeros(weight, torch.int8 if wrong == "signs" else torch.uint8)
    with pytest.raises(ValueError, match="must be"):
        adamw8_(weight, gradient, first, second, 1, **HOW)
    with pytest.raises(ValueError, match="weights must be bfloat16"):
        moved_(weight, weight, 0, decay=1, size=1)
