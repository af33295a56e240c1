"""The native training kernels against their torch twins, at awkward shapes; the same bits for any number of threads.

Shape letters: M rows, K inner, O outputs, T tokens, H hidden, I intermediate, E experts, V vocabulary.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deepseek import ops
from deepseek.ops import native
from deepseek.ops.linear import product

pytestmark = pytest.mark.skipif(not native.can_train(), reason="needs the native kernels")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels run wherever they can, also where BF16 would go to units of its own."""
    monkeypatch.setattr(native, "BF16", "native")
    monkeypatch.setattr(native, "CHOSEN", True)


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
                           env={**os.environ, "DEEPSEEK_ISA": isa, "DEEPSEEK_BF16": "native"}).stdout for isa in able}
    assert len(said) == 1


def test_the_choice_is_apart_from_the_ability(monkeypatch: pytest.MonkeyPatch) -> None:
    half, full = randn(2, 3, dtype=torch.bfloat16), randn(2, 3)
    assert native.trains_native(half, full) and not ops.fast_bf16("cpu")
    monkeypatch.setattr(native, "BF16", "torch")
    assert native.can_train(half, full) and native.trains_native(full) and not native.trains_native(half, full)
    assert ops.fast_bf16("cpu") and not native.can_train(full.double(), half)
    monkeypatch.setattr(native, "CHOSEN", False)  # the plain kernels, where nobody asked for them
    assert native.can_train(full) and not native.trains_native(full)
