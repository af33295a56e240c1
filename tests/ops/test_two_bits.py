"""Two bits a number: the native kernel against torch's form, byte for byte; what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepseek.ops import native, two_bits
from deepseek.ops.two_bits import decode, encode, nbytes, pack2, unpack2
from tests.helpers.coding import assert_native_is_torch, by_torch

# whole vectors and parts of them, rows that end within a byte, more than a task
SHAPES = [(1, 1), (3, 5), (5, 17), (4, 256), (7, 48), (1, 9001), (3, 700), (2000, 15), (150, 512)]


def rows(kind: str, shape: tuple[int, int], seed: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if kind == "sizes":  # from nothing to what FP32 can hold, rows of zeros among them
        return x * torch.logspace(-44, 37, shape[0])[:, None] * (torch.arange(shape[0]) % 3 > 0)[:, None]
    if kind == "outlier":
        x[:, 0] = 1e30
    return {"normal": x, "outlier": x, "equal": x[:, :1].expand(shape).contiguous(),
            "near": 1 + x.sign() * 2.0**-23}[kind]


@pytest.mark.skipif(native.native is None, reason="needs the native kernels")
@pytest.mark.parametrize("kind", ["normal", "sizes", "outlier", "equal", "near"])
@pytest.mark.parametrize("shape", SHAPES)
def test_native_bytes_are_torchs(shape: tuple[int, int], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_native_is_torch(two_bits, shape, [rows(kind, shape, seed) for seed in range(4)], monkeypatch)


def test_payload_and_rest_make_the_whole() -> None:
    value, less, error = (rows("normal", (9, 100), seed) for seed in range(3))
    coded = encode(value, less, error, 0.9)
    assert coded is not None and len(coded[0]) == nbytes((9, 100))
    wanted = value - less + 0.9 * error
    assert torch.equal(coded[1], wanted - decode(coded[0], (9, 100))) and float(coded[1].norm() / wanted.norm()) < 0.38


@pytest.mark.parametrize("force_torch", [False, True])
@pytest.mark.parametrize("place", [0, 16, 76])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_found(
    wrong: float, place: int, force_torch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if force_torch:
        by_torch(two_bits, monkeypatch)
    x, zeros = torch.zeros(300, 77), torch.zeros(300, 77)
    x[250, place] = wrong
    x[250, 5] = -wrong
    assert encode(x) is None and encode(zeros, x) is None and encode(zeros, None, x) is None
    assert encode(torch.full((1, 64), 3e38)) is not None  # the sum of a row may be beyond FP32


def test_what_does_not_fit_is_refused() -> None:
    x = torch.zeros(4, 64)
    for given in ((x.double(),), (x, x[:3]), (x, None, x.bfloat16()), (x.view(-1),)):
        with pytest.raises(ValueError, match="numbers to be coded must be float32"):
            encode(*given)
    payload = torch.zeros(nbytes((4, 64)), dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"must be 96 bytes, got torch\.uint8 \[95\]"):
        decode(payload[1:], (4, 64))
    with pytest.raises(ValueError, match="must be added to float32"):
        decode(payload, (4, 64), 1.0, x[:3])


def test_codes_are_packed_as_plain_python_would() -> None:
    codes = torch.randint(0, 4, (40,), generator=torch.Generator().manual_seed(1)).byte()
    packed = pack2(codes.view(-1, 4))
    assert packed.tolist() == [sum(int(code) << 2 * i for i, code in enumerate(codes[n : n + 4]))
                               for n in range(0, 40, 4)]
    assert torch.equal(unpack2(packed), codes)
