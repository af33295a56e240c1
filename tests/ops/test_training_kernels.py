"""The native training kernels against their torch twins, at awkward shapes; the same bits for any number of threads.

Shape letters: M rows, K inner, O outputs, T tokens, H hidden, I intermediate, E experts, V vocabulary.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from deepseek import ops
from deepseek.ops import native, rotary
from deepseek.ops.linear import product
from tests.helpers.bf16 import UNITS, WAYS, computed_by

pytestmark = pytest.mark.skipif(not native.can_train(), reason="needs the native kernels")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True, params=[way for way in WAYS if way != "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The kernels run wherever they can, on FP32 units and on the BF16 units that the machine or the build has."""
    monkeypatch.setattr(native, "CHOSEN", True)
    with computed_by(request.param):
        yield request.param


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_grads(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Value and gradients of a random projection of it."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, randn(*out.shape, seed=99, dtype=out.dtype))]


def compare(function: Callable[..., Tensor], *inputs: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """`function` with the native kernels, with three threads of them, and without."""
    ours = with_grads(function, *inputs)
    monkeypatch.setattr(native, "threads", lambda: 3)
    for a, b in zip(ours, with_grads(function, *inputs), strict=True):
        assert torch.equal(a, b)
    monkeypatch.setattr(native, "trains_native", lambda *_: False)
    for a, b in zip(ours, with_grads(function, *inputs), strict=True):
        assert a.dtype == b.dtype
        half = torch.bfloat16 in (a.dtype, inputs[0].dtype)
        size = float(b.abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a.float(), b.float(), rtol=2e-2 if half else 1e-4,
                                   atol=(1e-2 if half else 1e-5) * max(size, 1e-3))


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES])
@pytest.mark.parametrize("sides", [(a, b) for a in (False, True) for b in (False, True)])
@pytest.mark.parametrize("shape", [(0, 5, 3), (1, 1, 1), (3, 7, 0), (15, 33, 17), (29, 31, 385), (113, 400, 40),
                                   (2, 385, 769)])
def test_products(
    shape: tuple[int, int, int], sides: tuple[bool, bool], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    rows, columns, inner = shape
    a, b = randn(rows, inner, dtype=dtypes[0]), randn(inner, columns, seed=1, dtype=dtypes[1])
    for x in (a, b):  # the operands are rounded where the activations are BF16
        want = a.to(x.dtype).double() @ b.to(x.dtype).double()
        left, right = (t.t().contiguous() if turned else t for t, turned in zip((a, b), sides, strict=True))
        for out in DTYPES:
            got = product(left, right, x, out, a_transposed=sides[0], b_transposed=sides[1])
            assert got.dtype == out
            torch.testing.assert_close(got.double(), want, rtol=8e-3 if out == torch.bfloat16 else 1e-5, atol=2e-4)


def amx_order(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """a @ b as AMX adds: over 32 inner columns a sum of the even and a sum of the odd ones, both added to the result.
    Products of BF16 numbers are exact in FP32, so a sum of rounded steps is a chain of fused multiply-adds."""
    out = torch.zeros(len(a_MK), b_KN.shape[1])
    for k in range(0, len(b_KN), 32):
        sums = []
        for first in (k, k + 1):
            part = torch.zeros_like(out)
            for column in range(first, min(k + 32, len(b_KN)), 2):
                part += a_MK[:, column, None] * b_KN[column]
            sums.append(part)
        out += sums[0] + sums[1]
    return out


def avx512_bf16_order(a_MK: Tensor, b_KN: Tensor, depth: int = 384) -> Tensor:
    """a @ b as AVX512-BF16 adds: blocks of `depth` inner columns, in each the odd one of a pair before the even one."""
    out = torch.zeros(len(a_MK), b_KN.shape[1])
    for k in range(0, len(b_KN), depth):
        part, end = torch.zeros_like(out), min(k + depth, len(b_KN))
        for even in range(k, end, 2):
            for column in (even + 1, even):
                if column < end:
                    part += a_MK[:, column, None] * b_KN[column]
        out = part if k == 0 else out + part
    return out


@pytest.mark.parametrize("way", ["units"] if UNITS else [], indirect=True)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 31), (15, 33, 17), (33, 65, 64), (70, 31, 449), (130, 390, 40),
                                   (2, 20, 900)])
def test_products_on_bf16_units_have_the_bits_of_their_order(way: str, shape: tuple[int, int, int]) -> None:
    rows, columns, inner = shape
    a, b = randn(rows, inner, dtype=torch.bfloat16), randn(inner, columns, seed=1)
    want = (amx_order if UNITS.startswith("amx") else avx512_bf16_order)(a.float(), b.bfloat16().float())
    for right in (b, b.bfloat16()):
        for left, turned in ((a, False), (a.t().contiguous(), True)):
            assert torch.equal(product(left, right, a, torch.float32, a_transposed=turned), want)
            assert torch.equal(product(left, right.t().contiguous(), a, torch.float32, a_transposed=turned,
                                       b_transposed=True), want)
        assert torch.equal(product(a, right, a, torch.bfloat16), want.bfloat16())


def test_a_product_of_strided_rows() -> None:
    a, b = randn(20, 50)[:, 3:20], randn(17, 9, seed=1)
    torch.testing.assert_close(product(a, b, a, torch.float32), a @ b)
    torch.testing.assert_close(product(a.t(), a, a, torch.float32), a.t() @ a)


@pytest.mark.parametrize("shape", [(1, 1, 1), (37, 40, 19), (130, 16, 400)])
def test_linear(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    rows, inner, outputs = shape
    x, w = randn(rows, inner, dtype=torch.bfloat16), randn(outputs, inner, seed=1)
    compare(ops.linear, x, w, monkeypatch=monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 17), (65, 48), (200, 33)])
def test_norm(shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = randn(*shape, dtype=dtype), randn(shape[1], seed=1)
    compare(lambda x, w: ops.rms_norm(x, w, 1e-6), x, w, monkeypatch=monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (7, 19), (2, 9000)])
def test_swiglu(shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, up = randn(*shape, dtype=dtype) * 4, randn(*shape, seed=1, dtype=dtype)
    compare(ops.swiglu, gate, up, monkeypatch=monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("pairs", [1, 4, 11, 16, 37])
@pytest.mark.parametrize("rows", [1, 2])
def test_rotation_to_the_bit(
    rows: int, pairs: int, interleave: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are a part of longer ones, cosines of every sequence and of all."""
    whole, angle = randn(2, 21, 3, 2 * pairs + 5, dtype=dtype), randn(rows, 21, pairs, seed=1)

    def run(x: Tensor) -> Tensor:
        return ops.rotate(x[..., 5:], angle.cos(), angle.sin(), interleave)

    ours = with_grads(run, whole)
    assert "NativeRotate" in type(run(whole.clone().requires_grad_()).grad_fn).__name__
    monkeypatch.setattr(rotary, "trains_native", lambda *_: False)
    assert all(torch.equal(a, b) for a, b in zip(ours, with_grads(run, whole), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 15, 113, 400])
def test_attention(length: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (randn(2, length, 3, width, seed=width, dtype=dtype).transpose(1, 2) for width in (21, 21, 10))
    compare(lambda q, k, v: ops.causal_attention(q, k, v, 0.3), q, k, v, monkeypatch=monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 40, 700])
def test_experts(tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Expert 0 gets every token, expert 4 none."""
    hidden, inner, experts = 35, 18, 5
    index_TK = torch.stack((torch.zeros(tokens, dtype=torch.long), 1 + torch.arange(tokens) % 3), 1)
    inputs = (randn(tokens, hidden, dtype=dtype), randn(tokens, 2, seed=1).abs(),
              randn(experts, 2 * inner, hidden, seed=2) * 0.2, randn(experts, hidden, inner, seed=3) * 0.2)
    compare(lambda x, weight, *w: ops.expert_mlp(x, index_TK, weight, *w), *inputs, monkeypatch=monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (5, 17), (130, 401)])
def test_loss(rows: int, vocab: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.arange(rows) % vocab
    labels[2::3] = -100
    x, w = randn(rows, 24, dtype=dtype) * 3, randn(vocab, 24, seed=1)
    compare(lambda x, w: ops.linear_cross_entropy(x, w, labels), x, w, monkeypatch=monkeypatch)


PROGRAM = """
import hashlib, torch
from deepseek import ops
from deepseek.ops.linear import product
from tests.helpers.bf16 import UNITS, WAYS, computed_by
g = torch.Generator().manual_seed(0)
x = torch.randn(50, 70, generator=g).bfloat16().requires_grad_()
w = torch.randn(90, 70, generator=g, requires_grad=True)
q = torch.randn(1, 2, 140, 20, generator=g, requires_grad=True)
y = ops.swiglu(ops.linear(x, w), ops.linear(x, w)).float().sum() + ops.causal_attention(q, q, q, 0.2).sum()
y = y + ops.linear_cross_entropy(x, w, torch.arange(50)) + ops.rms_norm(x, w[0], 1e-6).float().sum()
y.backward()
print(*(hashlib.sha256(t.detach().float().numpy().tobytes()).hexdigest() for t in (y, x.grad, w.grad, q.grad)))
"""


def test_the_same_bits_from_every_instruction_set() -> None:
    unknown = subprocess.run([sys.executable, "-c", "from deepseek import _native; _native.isa()"],
                             capture_output=True, text=True, env={**os.environ, "DEEPSEEK_ISA": "none"})
    able = unknown.stderr.rstrip().rpartition("have ")[2].split(", ")
    assert native.isa() in able and "scalar" in able
    said = {subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True,
                           env={**os.environ, "DEEPSEEK_ISA": isa, "DEEPSEEK_BF16": "fp32"}).stdout for isa in able}
    assert len(said) == 1


@pytest.mark.parametrize("way", ["fp32"], indirect=True)
def test_the_choice_is_apart_from_the_ability(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    half, full = randn(2, 3, dtype=torch.bfloat16), randn(2, 3)
    assert native.trains_native(half, full)
    native.use_bf16("torch")
    assert native.can_train(half, full) and native.trains_native(full) and not native.trains_native(half, full)
    assert not native.can_train(full.double(), half)
    monkeypatch.setattr(native, "CHOSEN", False)  # the plain kernels, where nobody asked for them
    assert native.can_train(full) and not native.trains_native(full)


def test_rates_are_of_what_is_there_and_the_way_stays(way: str) -> None:
    ways = {"fp32"} | ({"units"} if UNITS else set()) | ({"torch"} if native.torch_has_bf16_units() else set())
    a = randn(70, 449, dtype=torch.bfloat16)
    before = product(a, a, a, torch.float32, b_transposed=True)
    rates = native.product_rates(rows=40, side=70)
    assert torch.equal(product(a, a, a, torch.float32, b_transposed=True), before)
    assert set(rates) == ways and all(rate > 0 for rate in rates.values())
