"""Activations in FP8: what they keep, what is left as it is, and what they take."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from deepseek.ops.saved import NARROW, Packed, Saver


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_a_number_is_off_by_a_sixteenth_at_most_and_a_row_by_its_scale(dtype: torch.dtype, size: float) -> None:
    x = (randn(64, 100) * torch.logspace(0, -3, 100) * size).to(dtype)
    x[3] = 0
    back = Packed(x, StorageWeakRef(x.untyped_storage())).unpack()
    assert back.dtype == dtype and torch.equal(back[3], x[3])
    least = x.float().abs().amax(1, keepdim=True) / 448 * 2**-9  # the smallest number but 0
    assert bool(((back.float() - x.float()).abs() <= (x.float().abs() * (1 / 16 + 2**-8)).maximum(least)).all())


def test_what_several_operations_save_is_there_once_and_goes_with_them() -> None:
    saver, x = Saver(), randn(8, 64).requires_grad_()
    with saver.saving([]):
        h = x * 2
        out = (h * h).sum() + (h * 3).exp().sum() + h.sigmoid().sum()
    kept = list(saver._packed.values())
    assert len(kept) == 3  # h, the exponentials and the sigmoids
    del kept
    out.backward()
    del out, h
    gc.collect()
    assert not saver._packed
    assert x.grad is not None and bool(x.grad.isfinite().all())


def test_new_contents_are_not_taken_for_old_ones() -> None:
    saver, x = Saver(), randn(8, 64).requires_grad_()
    with saver.saving([]):
        total = torch.zeros(())
        for factor in (1.0, 10.0, 100.0):  # each in memory that the one before may have left
            total = total + (x * factor).pow(2).sum()
    total.backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * x.detach() * (1 + 100 + 10000), rtol=0.07, atol=1e-2)


def test_what_is_changed_in_place_is_another_tensor() -> None:
    saver, h = Saver(), randn(8, 64)
    x = torch.ones(8, 64, requires_grad=True)
    with saver.saving([]):
        first = (x * h).sum()
        h.mul_(-5)
        second = (x * h).sum()
        assert len(saver._packed) == 2
    for out, want in ((first, h / -5), (second, h)):
        (gradient,) = torch.autograd.grad(out, x)
        torch.testing.assert_close(gradient, want, rtol=0.07, atol=1e-2)


def test_parameters_indices_and_narrow_rows_stay_as_they_are() -> None:
    saver, w = Saver(), torch.nn.Parameter(randn(64, 64))
    x, narrow = randn(4, 64).requires_grad_(), randn(100, NARROW - 1).requires_grad_()
    with saver.saving([w]):
        out = (x @ w.t() + x[torch.tensor([0, 1, 2, 3])]).sum() + (narrow * narrow).sum()
    assert [packed.code.shape for packed in saver._packed.values()] == [x.shape]
    out.backward()
    assert x.grad is not None and narrow.grad is not None
    torch.testing.assert_close(x.grad, w.detach().sum(0).expand(4, -1) + 1)
    assert torch.equal(narrow.grad, 2 * narrow.detach())
