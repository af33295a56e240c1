"""Every fast operation against its slow twin, values and gradients.

Shape letters: M rows, K inner (or experts a token), O outputs, B batch, N heads, T queries, S keys, D key width,
W value width, E experts, H hidden, I intermediate, V vocabulary.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.functional import linear as torch_linear
from torch.utils._python_dispatch import TorchDispatchMode

from deepseek import ops
from deepseek.ops import attention, experts, loss, native
from deepseek.ops.linear import fast_bf16, mm, to_compute_dtype

LINEAR = sys.modules["deepseek.ops.linear"]  # the module: `ops.linear` is the function


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_grads(function: Callable[..., Tensor], *inputs: Tensor | None, seed: int = 99) -> tuple[Tensor, list[Tensor]]:
    """The value of `function` and the gradients of a random projection of it in every floating input."""
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) if t is not None else None for t in inputs]
    out = function(*leaves)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    direction = randn(*out.shape, seed=seed, dtype=out.dtype)
    return out.detach(), list(torch.autograd.grad(out, wanted, direction))


def assert_agree(
    ours: tuple[Tensor, list[Tensor]], theirs: tuple[Tensor, list[Tensor]], *, rtol: float = 1e-5, atol: float = 1e-6
) -> None:
    for a, b in zip((ours[0], *ours[1]), (theirs[0], *theirs[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def within_one_ulp(a: Tensor, b: Tensor) -> bool:
    """BF16 numbers at most one step apart; 1e-5 allows for the FP32 sums where terms cancel."""
    larger = torch.maximum(a.float().abs(), b.float().abs())
    return bool(((a.float() - b.float()).abs() <= larger * 2.0**-7 + 1e-5).all())


# ---- linear -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8), (1, 1, 8), (0, 8)])
def test_linear_fp32_is_torchs(shape: tuple[int, ...], bias: bool) -> None:
    x, w, b = randn(*shape), randn(6, 8, seed=1), randn(6, seed=2) if bias else None
    assert_agree(with_grads(ops.linear, x, w, b), with_grads(torch_linear, x, w, b))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("units", ["as here", "FP32", "BF16"])
def test_linear_bf16_is_torchs_within_one_ulp(units: str, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the units of this machine, and through both kinds whatever the machine has."""
    if units != "as here":
        monkeypatch.setattr(LINEAR, "fast_bf16", lambda _: units == "BF16")
    half = torch.bfloat16
    x, w, b = randn(7, 64, dtype=half), randn(9, 64, seed=1, dtype=half), randn(9, seed=2, dtype=half) if bias else None
    ours, theirs = with_grads(ops.linear, x, w, b), with_grads(torch_linear, x, w, b)
    assert ours[0].dtype == half and within_one_ulp(ours[0], theirs[0])
    for a, c in zip(ours[1], theirs[1], strict=True):
        assert a.dtype == half and within_one_ulp(a, c)


def test_linear_bf16_is_the_fp32_sum_rounded_once() -> None:
    x, w = randn(7, 64, dtype=torch.bfloat16), randn(9, 64, seed=1, dtype=torch.bfloat16)
    exact = (x.double() @ w.double().t()).to(torch.bfloat16)
    assert within_one_ulp(ops.linear(x, w), exact) and within_one_ulp(mm(x, w.t()), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_weights_under_half_activations(dtype: torch.dtype) -> None:
    x, w, b = randn(2, 3, 16, dtype=dtype), randn(5, 16, seed=1), randn(5, seed=2)
    value, (dx, dw, db) = with_grads(ops.linear, x, w, b)
    assert (value.dtype, dx.dtype, dw.dtype, db.dtype) == (dtype, dtype, torch.float32, torch.float32)
    _, (dx32, dw32, db32) = with_grads(torch_linear, x.float(), w, b)
    torch.testing.assert_close(value.float(), torch_linear(x.float(), w, b), rtol=1e-2, atol=3e-2)
    torch.testing.assert_close(dx.float(), dx32, rtol=1e-2, atol=3e-2)
    torch.testing.assert_close(dw, dw32, rtol=2e-2, atol=3e-2)
    torch.testing.assert_close(db, db32, rtol=2e-2, atol=3e-2)


def test_linear_skips_the_gradients_nobody_wants() -> None:
    x, w = randn(3, 8, dtype=torch.bfloat16), randn(4, 8, seed=1, dtype=torch.bfloat16)
    w.requires_grad_()
    ops.linear(x, w).sum().backward()
    assert x.grad is None and w.grad is not None
    assert ops.linear(x, w.detach()).grad_fn is None


def test_widen_leaves_fp32_alone() -> None:
    x = randn(3)
    assert to_compute_dtype(x) is x
    half = x.bfloat16()
    assert to_compute_dtype(half).dtype == (torch.bfloat16 if fast_bf16("cpu") else torch.float32)


# ---- rms_norm -----------------------------------------------------------------------------------------------------


def plain_rms_norm(x: Tensor, w_H: Tensor, eps: float) -> Tensor:
    h = x.float()
    return ((h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * w_H.to(x.dtype)).to(x.dtype)


@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12), (1, 1, 12), (12,)])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_rms_norm_and_its_gradients(shape: tuple[int, ...], scale: float) -> None:
    x, w = randn(*shape) * scale, randn(12, seed=1)
    ours = with_grads(lambda a, b: ops.rms_norm(a, b, 1e-6), x, w)
    theirs = with_grads(lambda a, b: plain_rms_norm(a, b, 1e-6), x, w)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours[1][0] * scale, theirs[1][0] * scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[1][1], theirs[1][1], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(ops.rms_norm(x, w, 1e-6), ours[0], rtol=1e-6, atol=1e-6)


def test_rms_norm_bf16_under_fp32_weights() -> None:
    x, w = randn(4, 32, dtype=torch.bfloat16), randn(32, seed=1)
    value, (dx, dw) = with_grads(lambda a, b: ops.rms_norm(a, b, 1e-6), x, w)
    assert (value.dtype, dx.dtype, dw.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert within_one_ulp(value, plain_rms_norm(x, w, 1e-6))
    _, (dx32, dw32) = with_grads(lambda a, b: plain_rms_norm(a, b, 1e-6), x.float(), w)
    torch.testing.assert_close(dx.float(), dx32, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(dw, dw32, rtol=2e-2, atol=3e-2)


def test_rms_norm_of_zeros_is_finite() -> None:
    value, (dx, dw) = with_grads(lambda a, b: ops.rms_norm(a, b, 1e-6), torch.zeros(2, 4), torch.ones(4))
    assert bool((value == 0).all()) and bool(dx.isfinite().all()) and bool((dw == 0).all())


# ---- linear_cross_entropy -----------------------------------------------------------------------------------------


def plain_loss(x_MH: Tensor, w_VH: Tensor, labels_M: Tensor) -> Tensor:
    return cross_entropy(x_MH.float() @ w_VH.float().t(), labels_M)


@pytest.mark.parametrize("rows", [1, 16, 37, 64])
@pytest.mark.parametrize("chunk", [1, 16, 20, 1000])
def test_cross_entropy_and_its_gradients(rows: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "chunk_rows", lambda _: chunk)
    x, w = randn(rows, 8), randn(11, 8, seed=1)
    labels = torch.arange(rows) % 11
    labels[1::3] = -100
    assert_agree(with_grads(ops.linear_cross_entropy, x, w, labels), with_grads(plain_loss, x, w, labels))
    with torch.no_grad():
        torch.testing.assert_close(ops.linear_cross_entropy(x, w, labels), plain_loss(x, w, labels))


def test_chunks_hold_the_bytes_they_should() -> None:
    assert loss.chunk_rows(4096) * 4096 * 4 == loss.CHUNK_BYTES
    assert loss.chunk_rows(1 << 30) == 16


def test_nothing_labelled_costs_nothing() -> None:
    value, (dx, dw) = with_grads(ops.linear_cross_entropy, randn(5, 8), randn(11, 8, seed=1), torch.full((5,), -100))
    assert value == 0 and bool((dx == 0).all()) and bool((dw == 0).all())


@pytest.mark.parametrize("label", [-1, 11, -101])
def test_a_label_that_is_no_word_is_an_error_not_a_lesson(label: int) -> None:
    with pytest.raises((RuntimeError, IndexError), match=r"out of (bounds|range)"):
        ops.linear_cross_entropy(randn(3, 8), randn(11, 8, seed=1), torch.tensor([1, label, -100]))


def test_cross_entropy_of_huge_logits_is_finite() -> None:
    x, w = randn(6, 8) * 1e3, randn(11, 8, seed=1) * 1e3
    labels = torch.arange(6)
    assert_agree(with_grads(ops.linear_cross_entropy, x, w, labels), with_grads(plain_loss, x, w, labels),
                 rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("frozen", ["x", "w", "both"])
def test_cross_entropy_with_a_frozen_side(frozen: str) -> None:
    x, w = randn(6, 8), randn(11, 8, seed=1)
    x.requires_grad_(frozen == "w")
    w.requires_grad_(frozen == "x")
    value = ops.linear_cross_entropy(x, w, torch.arange(6))
    _, (dx, dw) = with_grads(plain_loss, x, w, torch.arange(6), seed=99)
    if frozen == "both":
        assert value.grad_fn is None
        return
    value.backward(randn(seed=99))
    torch.testing.assert_close(*((w.grad, dw) if frozen == "x" else (x.grad, dx)))
    assert (x.grad is None) == (frozen == "x")


def test_cross_entropy_bf16() -> None:
    x, w = randn(40, 16, dtype=torch.bfloat16), randn(11, 16, seed=1)
    labels = torch.arange(40) % 11
    value, (dx, dw) = with_grads(ops.linear_cross_entropy, x, w, labels)
    want, (dx32, dw32) = with_grads(plain_loss, x.float(), w.bfloat16().float(), labels)
    assert (value.dtype, dx.dtype, dw.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    torch.testing.assert_close(value, want, rtol=5e-3, atol=1e-3)
    torch.testing.assert_close(dx.float(), dx32, rtol=3e-2, atol=2e-3)
    torch.testing.assert_close(dw, dw32, rtol=3e-2, atol=2e-3)


# ---- attention ----------------------------------------------------------------------------------------------------


def qkv(
    length: int, *, dtype: torch.dtype = torch.float32, keys: int | None = None, d: int = 12, w: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N, T, D], [B, N, S, D], [B, N, S, W], laid out as the model hands them over: heads second by a transpose."""
    keys = keys or length
    q, k, v = (randn(2, rows, 3, width, seed=seed, dtype=dtype).transpose(1, 2)
               for rows, width, seed in ((length, d, 1), (keys, d, 2), (keys, w, 3)))
    return q, k, v


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention.attention_reference(q, k, v, 0.3, None)


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ops.causal_attention(q, k, v, 0.3)


@pytest.mark.parametrize("path", ["own", "torch"])
@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 300])
def test_causal_attention_and_its_gradients(length: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "torch":
        monkeypatch.setattr(attention, "LONGEST_SAVED", 0)
    q, k, v = qkv(length)
    assert_agree(with_grads(ours, q, k, v), with_grads(reference, q, k, v), rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(ours(q, k, v), reference(q, k, v), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("d", "w"), [(8, 8), (8, 12), (12, 8)])
@pytest.mark.parametrize("grad", [False, True])
def test_any_pair_of_widths(d: int, w: int, grad: bool) -> None:
    q, k, v = qkv(9, d=d, w=w)
    out = ours(q.requires_grad_(grad), k, v)
    assert out.shape == (2, 3, 9, w)
    torch.testing.assert_close(out.detach(), reference(q, k, v).detach(), rtol=1e-4, atol=1e-5)


def test_causal_attention_bf16() -> None:
    q, k, v = qkv(150, dtype=torch.bfloat16)
    value, grads = with_grads(ours, q, k, v)
    want, wide = with_grads(reference, q.float(), k.float(), v.float())
    assert value.dtype == torch.bfloat16
    torch.testing.assert_close(value.float(), want, rtol=2e-2, atol=2e-2)
    for a, b in zip(grads, wide, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.float(), b, rtol=5e-2, atol=3e-2)


def test_only_some_inputs_want_gradients() -> None:
    for wanted in itertools.product((False, True), repeat=3):
        inputs = [t.clone().requires_grad_(want) for t, want in zip(qkv(5), wanted, strict=True)]
        out = ours(*inputs)
        assert out.requires_grad == any(wanted)
        if any(wanted):
            out.sum().backward()
        assert [t.grad is not None for t in inputs] == list(wanted)


def test_the_rows_of_a_batch_do_not_touch() -> None:
    q, k, v = qkv(40)
    q.requires_grad_()
    assert torch.equal(ours(q, k, v)[1:], ours(q[1:], k[1:], v[1:]))


@pytest.mark.parametrize("keys", [6, 9])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (2, 3)])
def test_masks(keys: int, shape: tuple[int, int]) -> None:
    q, k, v = qkv(6, keys=keys)
    mask = torch.rand(*shape, 6, keys, generator=torch.Generator().manual_seed(4)) < 0.5
    mask[..., 0] = True
    want = attention.attention_reference(q, k, v, 0.3, mask)
    torch.testing.assert_close(ops.causal_attention(q, k, v, 0.3, mask), want, rtol=1e-4, atol=1e-5)
    both = [with_grads(lambda a, b, c, f=f: f(a, b, c, 0.3, mask), q, k, v)
            for f in (ops.causal_attention, attention.attention_reference)]
    assert_agree(*both, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("grad", [False, True])
def test_a_query_that_may_look_nowhere_is_finite_and_harmless(grad: bool) -> None:
    q, k, v = qkv(6)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
    mask[0, :, :3] = False
    for t in (q, k, v):
        t.requires_grad_(grad)
    out = ops.causal_attention(q, k, v, 0.3, mask)
    assert bool(out.isfinite().all())
    seen = mask.any(-1).expand(2, 3, 6)
    torch.testing.assert_close(out[seen], attention.attention_reference(q, k, v, 0.3, mask)[seen], rtol=1e-4, atol=1e-5)
    if grad:
        out.sum().backward()
        assert all(t.grad is not None and bool(t.grad.isfinite().all()) for t in (q, k, v))


# ---- experts ------------------------------------------------------------------------------------------------------

E, H, I, K = 6, 16, 8, 2


def choice(kind: str) -> Tensor:
    """index_TK of several loads."""
    if kind == "one token":
        return torch.tensor([[4, 1]])
    if kind == "all on one expert":
        return torch.full((9, 1), 3)
    if kind == "half are idle":
        return torch.tensor([[0, 2], [2, 5], [5, 0], [0, 5]])
    if kind == "no token":
        return torch.empty(0, K, dtype=torch.long)
    generator = torch.Generator().manual_seed(5)
    index = torch.rand(23, E, generator=generator).argsort(1)[:, :K]
    if kind == "some are elsewhere":
        index[torch.rand(23, K, generator=generator) < 0.5] = -1
        index[5] = -1
    return index.fill_(-1) if kind == "all are elsewhere" else index


KINDS = ["spread", "one token", "all on one expert", "half are idle", "some are elsewhere"]


def inputs_for(index_TK: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, k = index_TK.shape
    return (randn(tokens, H, seed=1, dtype=dtype), randn(tokens, k, seed=2).abs(), randn(E, 2 * I, H, seed=3) * 0.3,
            randn(E, H, I, seed=4) * 0.3)


def grouped(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The GPU form, reached as `expert_mlp` reaches it."""
    pairs = experts.sort_pairs(index, gate_up.shape[0])
    return experts.grouped(x, experts.pair_weights(weight, pairs), gate_up, down, pairs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", [ops.expert_mlp, grouped], ids=["loop", "grouped"])
def test_both_forms_are_the_reference(form: Callable[..., Tensor], kind: str) -> None:
    index = choice(kind)
    args = inputs_for(index)

    def call(function: Callable[..., Tensor]) -> tuple[Tensor, list[Tensor]]:
        return with_grads(lambda x, weight, gate_up, down: function(x, index, weight, gate_up, down), *args)

    assert_agree(call(form), call(experts.expert_mlp_reference), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_one_wide_ffn_is_the_reference_too(kind: str) -> None:
    index = choice(kind).clamp(min=0)
    index[:, 1:] = (index[:, :1] + torch.arange(1, K)) % E  # distinct again
    forms = [with_grads(lambda x, *w, f=f: f(x, index, *w), *inputs_for(index))
             for f in (experts.all_experts, experts.expert_mlp_reference)]
    assert_agree(*forms, rtol=1e-4, atol=1e-5)


def test_it_is_taken_for_a_third_of_the_narrow_experts_on_bf16_units(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    form = experts.all_experts

    def seen(*args: Tensor) -> Tensor:
        taken.append(args[1].shape[1])
        return form(*args)

    monkeypatch.setattr(experts, "all_experts", seen)
    index = torch.arange(E).repeat(5, 1)
    x, weight, gate_up, down = inputs_for(index, torch.bfloat16)
    gate_up.requires_grad_()
    for fast in (True, False):
        monkeypatch.setattr(experts, "fast_bf16", lambda _, fast=fast: fast)
        monkeypatch.setattr(experts, "trains_native", lambda *_, fast=fast: not fast and experts.native is not None)
        for top in range(1, E + 1):
            ops.expert_mlp(x, index[:, :top], weight[:, :top], gate_up, down)
        with torch.no_grad():
            ops.expert_mlp(x, index, weight, gate_up, down)
    assert taken == [top for top in range(1, E + 1) if 3 * top >= E]


@pytest.mark.parametrize("kind", ["no token", "all are elsewhere"])
def test_no_pair_at_all(kind: str) -> None:
    index = choice(kind)
    value, grads = with_grads(lambda x, w, g, d: ops.expert_mlp(x, index, w, g, d), *inputs_for(index))
    assert value.shape == (len(index), H) and not any(bool(t.any()) for t in (value, *grads))


@pytest.mark.parametrize("units", ["as here", "FP32", "BF16"])
@pytest.mark.parametrize("kind", KINDS)
def test_experts_in_bf16(kind: str, units: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if units != "as here":
        monkeypatch.setattr(LINEAR, "fast_bf16", lambda _: units == "BF16")
    index = choice(kind)
    x, weight, gate_up, down = inputs_for(index, torch.bfloat16)
    value, grads = with_grads(lambda *a: ops.expert_mlp(a[0], index, *a[1:]), x, weight, gate_up, down)
    assert [t.dtype for t in (value, *grads)] == [torch.bfloat16] * 2 + [torch.float32] * 3
    reference = experts.expert_mlp_reference
    want, wide = with_grads(lambda *a: reference(a[0], index, *a[1:]), x.float(), weight, gate_up, down)
    torch.testing.assert_close(value.float(), want, rtol=3e-2, atol=3e-2)
    for a, b in zip(grads, wide, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=5e-2, atol=8e-2)


@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=4)))
def test_experts_with_some_inputs_frozen(wanted: tuple[bool, ...]) -> None:
    """LoRA, ESFT and plain inference freeze different things: what is wanted is right, what is not is absent."""
    index = choice("half are idle")
    full = with_grads(lambda *a: experts.expert_mlp_reference(a[0], index, *a[1:]), *inputs_for(index))
    leaves = [t.requires_grad_(want) for t, want in zip(inputs_for(index), wanted, strict=True)]
    out = ops.expert_mlp(leaves[0], index, *leaves[1:])
    torch.testing.assert_close(out.detach(), full[0], rtol=1e-4, atol=1e-5)
    assert out.requires_grad == any(wanted)
    if any(wanted):
        out.backward(randn(*out.shape, seed=99))
    for leaf, want, grad in zip(leaves, wanted, full[1], strict=True):
        assert (leaf.grad is not None) == want
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, grad, rtol=1e-4, atol=1e-5)


def test_idle_experts_get_zero_gradients_not_rubbish() -> None:
    index = choice("half are idle")
    _, grads = with_grads(lambda *a: ops.expert_mlp(a[0], index, *a[1:]), *inputs_for(index))
    _, _, *of_experts = grads
    assert len(of_experts) == 2
    for grad in of_experts:
        assert bool((grad[[1, 3, 4]] == 0).all()) and bool((grad[[0, 2, 5]] != 0).any())


@pytest.mark.parametrize("grads", [False, True])
def test_the_loop_casts_visited_experts_one_by_one_and_keeps_no_copy(grads: bool) -> None:
    x, weight_P = randn(4, 8).requires_grad_(), randn(8).requires_grad_()
    gate_up, down = (randn(16, *shape, dtype=torch.bfloat16).requires_grad_(grads) for shape in ((32, 8), (8, 16)))
    pairs = experts.sort_pairs(torch.tensor([[3, 9], [9, 3], [3, 11], [11, 3]]), 16)
    sizes: list[int] = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default:
                sizes.append(out.numel())
            return out

    with Casts():
        out = experts.ExpertLoop.apply(x, weight_P, gate_up, down, pairs, True)
        kept = {t.data_ptr() for t in out.grad_fn.saved_tensors}
        out.sum().backward()
    assert {gate_up.data_ptr(), down.data_ptr()} <= kept
    assert sorted(sizes)[-1] == 32 * 8 and sizes.count(32 * 8) == 2 * 3  # three experts, forward and backward
    wide = experts.ExpertLoop.apply(x, weight_P, gate_up.float(), down.float(), pairs, False)
    assert torch.equal(out, wide)


def test_rows_of_zeros_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where BF16 products are oneDNN's, the rows of an expert are filled up; forced here on every machine."""
    monkeypatch.setattr(LINEAR, "fast_bf16", lambda _: True)
    half, index = torch.bfloat16, torch.tensor([[0, 3], [3, 0], [3, 1]] * 50)
    args = (randn(150, 8, dtype=half), randn(300, seed=1), randn(4, 32, 8, seed=2), randn(4, 8, 16, seed=3))
    pairs = experts.sort_pairs(index, 4)
    assert sorted(pairs.counts_E.tolist()) == [0, 50, 100, 150]
    heights: set[int] = set()
    real = experts._filler

    def watched(x: Tensor, count: int) -> Any:
        filled, rows = real(x, count), x[:1].expand(count, -1)
        heights.add(len(filled(rows)))
        assert (filled(rows) is rows) == (count in heights), "only rows that are filled up are copied"
        return filled

    def run(filler: Any) -> tuple[Tensor, ...]:
        monkeypatch.setattr(experts, "_filler", filler)
        leaves = [t.clone().requires_grad_() for t in args]
        out = experts.ExpertLoop.apply(*leaves, pairs, True)
        out.float().square().sum().backward()
        return out.detach(), *(leaf.grad for leaf in leaves)

    for filled, plain in zip(run(watched), run(lambda *_: lambda rows: rows), strict=True):
        torch.testing.assert_close(filled.float(), plain.float(), rtol=2e-2, atol=2e-2 * float(plain.abs().max()))
    assert heights == {64, 128, 256}


def test_a_linear_keeps_the_weight_as_it_is_stored() -> None:
    x, w = randn(4, 8).requires_grad_(), randn(6, 8, dtype=torch.bfloat16).requires_grad_()
    out = LINEAR.Linear.apply(x, w, randn(6, dtype=torch.bfloat16))
    assert w.data_ptr() in {t.data_ptr() for t in out.grad_fn.saved_tensors}
    out.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.ones(4, 6) @ w.detach().float())


def test_inference_saves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    index = choice("spread")
    args = inputs_for(index)
    saved: list[Tensor] = []
    flags: list[bool] = []
    form = experts.NativeExperts if native.trains_native(*args) else experts.ExpertLoop
    apply = form.apply

    def spy(*given: Any) -> Any:
        flags.append(given[-1])
        return apply(*given)

    monkeypatch.setattr(form, "apply", spy)

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    def run(*leaves: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            return ops.expert_mlp(leaves[0], index, *leaves[1:])

    assert run(*args).grad_fn is None and saved == []
    trained = [t.clone().requires_grad_() for t in args]
    with torch.no_grad():
        assert run(*trained).grad_fn is None and saved == []
    run(*trained)
    assert saved and flags == [False, False, True]


def test_experts_are_deterministic_and_blind_to_the_order_of_choice() -> None:
    index = choice("spread")
    x, weight, gate_up, down = inputs_for(index)
    one = ops.expert_mlp(x, index, weight, gate_up, down)
    assert torch.equal(one, ops.expert_mlp(x, index, weight, gate_up, down))
    assert torch.equal(one, ops.expert_mlp(x, index.flip(1), weight.flip(1), gate_up, down))


def test_sorted_pairs() -> None:
    index = choice("spread")
    pairs = experts.sort_pairs(index, E)
    assert pairs.counts_E.tolist() == [int((index == e).sum()) for e in range(E)]
    by_rows = index.flatten()[pairs.slot_TK.flatten().argsort()]
    assert by_rows.tolist() == sorted(index.flatten().tolist())
    for t, k in itertools.product(range(index.shape[0]), range(K)):
        assert pairs.token_P[pairs.slot_TK[t, k]] == t
    for e in range(E):  # stable: within an expert, tokens stay in order
        rows = pairs.token_P[by_rows == e]
        assert rows.tolist() == sorted(rows.tolist())
