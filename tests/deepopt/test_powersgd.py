"""PowerSGD: exact where it can be, nothing lost where it cannot, experts by themselves, against plain loops."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from deepseek.deepopt.powersgd import PowerSGD
from deepseek.errors import ConfigError

SHAPES = {"vector": (70,), "matrix": (48, 33), "experts": (5, 24, 31), "narrow": (40, 3), "one": ()}
LOW = ("matrix", "experts")  # that do not go whole


def gradients(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def low_rank(*shape: int, rank: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    *experts, rows, columns = shape
    return torch.randn(*experts, rows, rank, generator=generator) @ torch.randn(
        *experts, rank, columns, generator=generator)


def step(workers: list[PowerSGD], found: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What all workers get; that it is the same is asserted."""
    total = torch.stack([one.project(own) for one, own in zip(workers, found, strict=True)]).sum(0)
    total = torch.stack([one.turn(total) for one in workers]).sum(0)
    first, *others = [one.decode(total) for one in workers]
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)
    return first


@pytest.mark.parametrize("shape", [(40, 30), (3, 40, 30)])
def test_matrices_of_low_rank_go_over_as_they_are(shape: tuple[int, ...]) -> None:
    workers = [PowerSGD(4) for _ in range(2)]
    for seed in range(3):  # of rank 2 each, and so 4 together
        found = [{"w": low_rank(*shape, rank=2, seed=seed + 10 * worker)} for worker in range(2)]
        want = found[0]["w"] + found[1]["w"]
        assert torch.allclose(step(workers, list(found))["w"], want, atol=1e-3)
    high = low_rank(*shape, rank=8)
    assert not torch.allclose(step([PowerSGD(4)], [{"w": high}])["w"], high, atol=1.0)


def test_a_step_is_that_of_plain_loops() -> None:
    powersgd, w = PowerSGD(3), gradients(1)["matrix"]
    q = PowerSGD(3)._q("w", (1, *w.shape))[0].tolist()
    rows, columns = w.shape
    found = step([powersgd], [{"w": w}])["w"]
    m = w.tolist()
    basis: list[list[float]] = []
    for r in range(3):  # Gram-Schmidt on the columns of M Q
        p = [sum(m[i][j] * q[j][r] for j in range(columns)) for i in range(rows)]
        for other in basis:
            dot = sum(a * b for a, b in zip(p, other, strict=True))
            p = [a - dot * b for a, b in zip(p, other, strict=True)]
        norm = math.sqrt(sum(a * a for a in p))
        basis.append([a / norm for a in p])
    sent = [[sum(m[i][j] * p[i] for i in range(rows)) for j in range(columns)] for p in basis]
    want = torch.tensor([[sum(p[i] * s[j] for p, s in zip(basis, sent, strict=True)) for j in range(columns)]
                         for i in range(rows)])
    assert torch.allclose(found, want, atol=1e-4)
    assert torch.allclose(powersgd.error["w"][0], w - want, atol=1e-4)


def test_what_is_sent_and_what_is_left_make_the_whole() -> None:
    workers = [PowerSGD(2) for _ in range(2)]
    sent, total = ({name: torch.zeros(shape) for name, shape in SHAPES.items()} for _ in range(2))
    for seed in range(10):
        found = [gradients(seed + 100 * worker) for worker in range(2)]
        for name, value in step(workers, list(found)).items():
            sent[name] += value
            total[name] += found[0][name] + found[1][name]
    assert {*workers[0].error} == {*LOW}
    for name, shape in SHAPES.items():
        left = torch.zeros(shape)
        for one in workers if name in LOW else []:
            left += one.error[name].view(shape)
        assert torch.allclose(sent[name] + left, total[name], rtol=0, atol=1e-4)
        assert name not in LOW or float(left.abs().max()) > 0.1


def test_experts_are_matrices_of_their_own() -> None:
    w, together = gradients(3)["experts"], PowerSGD(2)
    apart = [PowerSGD(2) for _ in w]
    for number, one in enumerate(apart):
        one.load_state_dict({"q.w": together._q("w", w.shape)[number : number + 1]})
    for seed in (3, 4):
        w = gradients(seed)["experts"]
        stacked = step([together], [{"w": w}])["w"]
        alone = torch.stack([step([one], [{"w": expert}])["w"] for one, expert in zip(apart, w, strict=True)])
        assert torch.allclose(stacked, alone, atol=1e-4)


def test_an_expert_without_tokens_finds_its_direction_again() -> None:
    powersgd, w = PowerSGD(2), low_rank(3, 40, 30, rank=2)
    for _ in range(3):
        found = step([powersgd], [{"w": w * torch.tensor([1.0, 0.0, 1.0])[:, None, None]}])["w"]
        assert not found[1].any()
    assert bool(powersgd.q["w"].abs().amax(1).gt(0).all())
    assert torch.allclose(step([powersgd], [{"w": w}])["w"], w, atol=1e-3)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_sums_have_the_sizes_that_are_claimed(rank: int) -> None:
    powersgd, found = PowerSGD(rank), gradients(0)
    first = powersgd.project(found)
    second = powersgd.turn(first)
    want = [0, 0]
    for shape in SHAPES.values():
        *experts, rows, columns = (1, 1, *shape)
        if len(shape) > 1 and 2 * rank * (rows + columns) <= rows * columns:
            want = [want[0] + math.prod(experts) * rows * rank, want[1] + math.prod(experts) * columns * rank]
        else:
            want[0] += math.prod(shape)
    sizes = [sum(parts) for parts in zip(*map(powersgd.nbytes, SHAPES.values()), strict=True)]
    assert [4 * len(first), 4 * len(second)] == [4 * size for size in want] == sizes
    assert powersgd.matrices((20, 20)) == ((1, 20, 20) if rank <= 5 else None) and powersgd.matrices((0, 9, 9)) is None


def test_what_goes_whole_is_exact() -> None:
    found, got = gradients(0), step([PowerSGD(2)], [gradients(0)])
    for name in SHAPES.keys() - LOW:
        assert torch.equal(got[name], found[name])
    only = step([PowerSGD(2)], [{"vector": found["vector"]}])
    assert torch.equal(only["vector"], found["vector"])


def test_the_state_comes_back_bit_for_bit() -> None:
    one, two = PowerSGD(2), PowerSGD(2, seed=9)
    step([one], [gradients(0)])
    two.load_state_dict({name: tensor.clone() for name, tensor in one.state_dict().items()})
    assert {*one.state_dict()} == {f"{part}.{name}" for part in ("q", "error") for name in LOW}
    first, second = (step([each], [gradients(1)]) for each in (one, two))
    assert all(torch.equal(first[name], second[name]) for name in SHAPES)


def test_a_step_that_failed_can_be_taken_again() -> None:
    one, two = PowerSGD(2), PowerSGD(2)
    for each in (one, two):
        step([each], [gradients(0)])
    one.turn(one.project(gradients(1)))  # the second sum never came
    with pytest.raises(ConfigError, match="matrix: has values that are not finite"):
        one.project(gradients(1) | {"matrix": torch.full(SHAPES["matrix"], math.nan)})
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    first, second = (step([each], [gradients(1)]) for each in (one, two))
    assert all(torch.equal(first[name], second[name]) for name in SHAPES)


def test_gradients_may_be_overwritten_under_way() -> None:
    one, two, own = PowerSGD(2), PowerSGD(2), gradients(0)
    total = one.turn(one.project(own))
    for gradient in own.values():
        gradient.zero_()
    want = step([two], [gradients(0)])
    got = one.decode(total)
    assert all(torch.equal(got[name], want[name]) for name in SHAPES)
    assert all(torch.equal(one.error[name], two.error[name]) for name in LOW)


def test_a_rank_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank = 0: must be at least 1"):
        PowerSGD(0)
