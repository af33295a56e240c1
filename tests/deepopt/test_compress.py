"""Codecs: sizes, what they keep, bits against plain Python; error feedback; the outer step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek.deepopt.compress import BLOCK, CODECS, ErrorFeedback, OuterNesterov, row_of
from deepseek.errors import ConfigError
from deepseek.ops.sparse import BEST, CHUNK, pack12, unpack12
from deepseek.ops.two_bits import EDGE

SHAPES = [(7,), (1,), (300,), (3, 5), (4, 256), (2, 6, 48), (1, 9001), (3, 700)]
BITS = {"none": 32, "bf16": 16, "int8": 8, "2bit": 2, "sparse": BEST * 14 / CHUNK}
ERROR = {"none": 0.0, "bf16": 2**-8, "int8": 0.02, "2bit": 0.38, "sparse": 1.0}  # |x' - x| / |x| of normal values


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CODECS)
def test_a_payload_has_the_size_that_it_says_and_gives_back_the_shape(name: str, shape: tuple[int, ...]) -> None:
    codec, x = CODECS[name], normal(*shape)
    payload = codec.encode(x)
    assert payload.dtype == torch.uint8 and len(payload) == codec.nbytes(shape)
    back = codec.decode(payload, shape)
    assert back.dtype == torch.float32 and back.shape == x.shape
    assert torch.equal(payload, codec.encode(x.clone()))  # the same values, the same bytes
    assert float((back - x).norm()) <= ERROR[name] * float(x.norm()) + 1e-6


@pytest.mark.parametrize("name", CODECS)
def test_large_tensors_take_the_bits_that_are_claimed(name: str) -> None:
    shape = (64, 4096)
    assert CODECS[name].nbytes(shape) * 8 / math.prod(shape) == pytest.approx(BITS[name], rel=0.11)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("make", [torch.zeros, lambda *shape: torch.full(shape, -3.0)], ids=["zeros", "equal"])
def test_values_without_spread_come_back(name: str, make: Any) -> None:
    x = make(4, 128)
    back = CODECS[name].decode(CODECS[name].encode(x), x.shape)
    assert torch.allclose(back[back != 0], torch.full_like(back[back != 0], -3.0)) or not x.any()
    if name != "sparse":
        assert torch.allclose(back, x)


def test_eight_bits_are_those_of_the_formula() -> None:
    x = normal(2, 300)
    back = CODECS["int8"].decode(CODECS["int8"].encode(x), x.shape).flatten()
    for begin in range(0, 600, BLOCK):
        part = x.flatten()[begin : begin + BLOCK].tolist()
        scale = max(map(abs, part)) / 127
        want = [scale * round(value / scale) for value in part]
        assert back[begin : begin + BLOCK].tolist() == pytest.approx(want, abs=1e-6)


def test_two_bits_are_those_of_the_formula() -> None:
    x = normal(5, 512)
    back = CODECS["2bit"].decode(CODECS["2bit"].encode(x), x.shape)
    for row, found in zip(x.tolist(), back.tolist(), strict=True):
        mean = sum(row) / len(row)
        edge = EDGE * (sum((value - mean) ** 2 for value in row) / len(row)) ** 0.5
        bins = [sum(value > limit for limit in (mean - edge, mean, mean + edge)) for value in row]
        means = {one: sum(v for v, b in zip(row, bins, strict=True) if b == one) / bins.count(one) for one in {*bins}}
        assert found == pytest.approx([means[one] for one in bins], rel=2**-8)


def test_the_largest_values_are_kept_and_the_first_of_equal_ones() -> None:
    x = normal(1, CHUNK + 100)
    x[0, 50:200] = 9.0  # more than are kept
    back = CODECS["sparse"].decode(CODECS["sparse"].encode(x), x.shape)[0]
    assert back[:CHUNK].nonzero().flatten().tolist() == [*range(50, 50 + BEST)] and bool((back[50:114] == 9).all())
    tail = x[0, CHUNK:]
    assert back[CHUNK:].nonzero().flatten().tolist() == sorted(tail.abs().argsort(descending=True)[:BEST].tolist())
    kept = back[CHUNK:].nonzero().flatten()
    assert torch.equal(back[CHUNK:][kept].sign(), tail[kept].sign())


def test_places_are_packed_as_plain_python_would() -> None:
    places = torch.randint(0, CHUNK, (64,), generator=torch.Generator().manual_seed(2))
    packed = pack12(places)
    number = sum(int(place) << 12 * i for i, place in enumerate(places))
    assert bytes(packed.tolist()) == number.to_bytes(96, "little") and torch.equal(unpack12(packed), places)


def test_short_rows_share_bins_within_a_tensor() -> None:
    assert [row_of(shape) for shape in ((8, 64), (7, 64), (4, 1024), (3, 5, 10))] == [512, 448, 1024, 150]


@pytest.mark.parametrize("name", ["int8", "2bit", "sparse"])
def test_what_is_sent_and_what_is_left_make_the_whole(name: str) -> None:
    feedback, sent, total = ErrorFeedback(CODECS[name]), torch.zeros(4, 600), torch.zeros(4, 600)
    for seed in range(20):
        x = normal(4, 600, seed=seed)
        sent += CODECS[name].decode(feedback.encode("w", x), x.shape)
        total += x
    assert torch.allclose(sent + feedback.error["w"], total, atol=1e-4)


def descend(feedback: bool) -> float:
    """How far two workers, who send the same gradient, stay from the minimum of sum_j c_j (x_j - 1)^2, which begins at
    a distance of 1."""
    order = torch.randperm(8192, generator=torch.Generator().manual_seed(0))
    scale, codec = torch.logspace(0, -1, 8192)[order].view(2, 4096), CODECS["sparse"]
    x, workers = torch.zeros(2, 4096), [ErrorFeedback(codec) for _ in range(2)]
    for _ in range(300):
        gradient, step = scale * (x - 1), torch.zeros_like(x)
        for worker in workers:
            step += codec.decode(worker.encode("x", gradient), x.shape) / 2
            if not feedback:
                worker.load_state_dict({})
        x -= 0.02 * step
    return float((x - 1).square().mean())


def test_error_feedback_sends_what_is_never_among_the_largest() -> None:
    assert descend(True) < 0.1 and descend(False) > 0.8


def test_the_state_of_a_worker_comes_back_bit_for_bit() -> None:
    one, two = ErrorFeedback(CODECS["2bit"], 0.9), ErrorFeedback(CODECS["2bit"], 0.9)
    one.encode("w", normal(4, 512))
    two.load_state_dict({name: tensor.clone() for name, tensor in one.state_dict().items()})
    x = normal(4, 512, seed=5)
    assert torch.equal(one.encode("w", x), two.encode("w", x))


def test_values_that_are_not_finite_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"layers\.1\.w: has values that are not finite"):
        ErrorFeedback(CODECS["2bit"]).encode("layers.1.w", torch.tensor([[1.0, math.nan]]))


def test_the_outer_step_is_sgd_with_nesterov_momentum() -> None:
    theta, outer = {"w": torch.ones(3)}, OuterNesterov(0.7, 0.9)
    parameter = torch.nn.Parameter(torch.ones(3))
    sgd = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
    for seed in range(4):
        change = normal(3, seed=seed)
        outer.step(theta, {"w": change})
        parameter.grad = change
        sgd.step()
    assert torch.allclose(theta["w"], parameter.detach())
