from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from deepseek.deepopt.optimizers import SMALL, MuonAdamW
from deepseek.deepopt.second_moments import SecondMoments

V, H = 64, 96  # SMALL numbers at least
assert V * H >= SMALL
LR, BETA2 = 1e-2, 0.95


def rank(small: int | None = None) -> tuple[SecondMoments, list[nn.Parameter]]:
    draw = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in ((V, H), (H,))]
    optimizer = MuonAdamW([{"params": parameters}], lr=LR, betas=(0.9, BETA2), momentum=0.0, small=small)
    return SecondMoments(optimizer, parameters), parameters


def take(moments: SecondMoments, parameters: list[nn.Parameter], gradients: list[Tensor]) -> None:
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient.clone()
    moments.optimizer.step()


def merge(ranks: list[SecondMoments], tokens: list[int]) -> None:
    rows = {number: moments.rows() for number, moments in enumerate(ranks)}
    for number, moments in enumerate(ranks):
        moments.merge(rows, dict(enumerate(tokens)), rows[number])


@pytest.mark.parametrize("small", [None, SMALL])
def test_rows_of_one_rank_and_rows_of_noise_count_as_in_step(small: int | None) -> None:
    draw = torch.Generator().manual_seed(1)
    noise = torch.randn(2, 200, V, H, generator=draw)
    noise[0, :, 0] = noise[1, :, 1] = 0  # tokens of the other rank alone
    (one, its), (two, others), (whole, together) = rank(small), rank(small), rank(small)
    for moments in (one, two):
        moments.divide([3, 3])
    for step in range(200):
        gradients = [[noise[number, step], noise[number, step, 2]] for number in range(2)]
        take(one, its, gradients[0])
        take(two, others, gradients[1])
        take(whole, together, [(a + b) / 2 for a, b in zip(*gradients, strict=True)])
        if step % 5 == 4:
            merge([one, two], [100, 100])
    wanted = whole.rows().float()
    for moments in (one, two):
        assert list(moments.optimizer.summed.values()) == [2.0, 2.0]
        assert torch.allclose(moments.rows().float() / 2, wanted, rtol=0.3)
    assert torch.allclose(one.rows(), two.rows(), rtol=0.02 if small else 2**-7)  # of BF16


def test_rows_rise_by_a_number_and_fall_by_a_factor() -> None:
    ranks, draw = [rank() for _ in range(2)], torch.Generator().manual_seed(2)
    for number, (moments, parameters) in enumerate(ranks):
        take(moments, parameters, [torch.randn(p.shape, generator=draw) * (1 + number) for p in parameters])
    before = [moments.optimizer.state[parameters[0]]["exp_avg_sq"].clone() for moments, parameters in ranks]
    means = [moments.rows()[:V, None].float() for moments, _ in ranks]  # as they are sent
    merge([moments for moments, _ in ranks], [300, 100])
    wanted = 0.75 * means[0] + 0.25 * means[1]
    assert (means[0] < means[1]).all()
    after = [moments.optimizer.state[parameters[0]]["exp_avg_sq"] for moments, parameters in ranks]
    assert torch.allclose(after[0], before[0] + wanted - means[0])
    assert torch.allclose(after[1], before[1] * wanted / means[1])


def test_ranks_count_by_their_shares_and_a_step_by_the_ranks() -> None:
    moments, parameters = rank()
    moments.divide([4, 4, 4, 4])
    assert set(moments.optimizer.summed.values()) == {4.0}
    start = [p.detach().clone() for p in parameters]
    gradients = [torch.ones_like(p) for p in parameters]
    take(moments, parameters, gradients)
    for p, old in zip(parameters, start, strict=True):
        assert torch.allclose(p, old - 2 * LR * torch.ones_like(old), atol=1e-6)  # 1 / sqrt(1 / 4) of a step
    moments.divide([6, 2])
    assert set(moments.optimizer.summed.values()) == {64 / 40}
    assert moments.nbytes == 2 * (V + 1)


def test_what_was_not_trained_yet_sends_zeros_and_stays() -> None:
    (one, its), (two, _) = rank(), rank()
    take(one, its, [torch.ones_like(p) for p in its])
    merge([one, two], [1, 1])
    assert torch.allclose(one.rows().float(), torch.full((V + 1,), (1 - BETA2) / 2), rtol=2**-7)
    assert not two.rows().any()
