"""The largest numbers of chunks: the native kernel against torch's form, byte for byte; what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepseek.ops import native, sparse
from deepseek.ops.sparse import CHUNK, decode, encode, nbytes
from tests.helpers.coding import assert_native_is_torch, by_torch


def numbers(kind: str, count: int, seed: int) -> Tensor:
    x = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    if kind == "sizes":  # from nothing to what FP32 can hold, zeros of either sign among them
        return x * torch.logspace(-44, 37, count) * (torch.arange(count) % 3 > 0)
    return {"normal": x, "few": x.round(), "equal": x.new_full((count,), -3.0), "zeros": x.new_zeros(count)}[kind]


@pytest.mark.skipif(native.native is None, reason="needs the native kernels")
@pytest.mark.parametrize("kind", ["normal", "sizes", "few", "equal", "zeros"])
@pytest.mark.parametrize("count", [1, 63, 64, 1000, CHUNK, CHUNK + 1, 70_001])
def test_native_bytes_are_torchs(count: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_native_is_torch(sparse, (count,), [numbers(kind, count, seed) for seed in range(4)], monkeypatch)


@pytest.mark.parametrize("force_torch", [False, True])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_found(
    wrong: float, force_torch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if force_torch:
        by_torch(sparse, monkeypatch)
    for count, place in ((3 * CHUNK, CHUNK + 7), (CHUNK + 5, CHUNK + 4)):
        x, zeros = torch.zeros(count), torch.zeros(count)
        x[place] = wrong
        assert encode(x) is None and encode(zeros, x) is None and encode(zeros, None, x) is None


def test_what_does_not_fit_is_refused() -> None:
    x = torch.zeros(300)
    for given in ((x.double(),), (x, x[:3]), (x, None, x.bfloat16()), (x.view(3, 100),)):
        with pytest.raises(ValueError, match="numbers to be coded must be float32"):
            encode(*given)
    payload = torch.zeros(nbytes((300,)), dtype=torch.uint8)
    with pytest.raises(ValueError, match="must be 120 bytes"):
        decode(payload[1:], (300,))
    with pytest.raises(ValueError, match="must be added to float32"):
        decode(payload, (300,), 1.0, x[:3])
