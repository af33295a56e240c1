"""Optimizer steps whose moments are kept in 8 bits, by blocks of 256 numbers with a scale of their own; steps of BF16
weights.

    Muon's momentum       linear: code c of -127 … 127 is c / 127 of the block's largest
    AdamW's first moment  a sign, 7 bits of a float (below): 3 % of the number at most, down to 1e-4 of the largest
    AdamW's second one    8 bits of a float: steps of 6 % at most, down to 1e-6 of the largest

Momentum needs no more than linear codes, AdamW needs small numbers told apart (arXiv 2110.02861; 2509.23106). A float's
code is what 4 bits of its fraction leave of it, counted from a smallest float that is added before and taken off after:
steps are even below it, so that zero has a code, and neither way needs a table or a root.

The second moment moves by a small share of itself in a step, often less than a code: what is cut off is rounded up
with the probability that keeps its mean, so that it does not stand still. The draw is a function of step and place: a
hash of the step, independent from step to step, plus the golden ratio's multiples from place to place. A resumed run
draws the same. The least code of a second moment is not zero, or a first one beside it would be divided by nothing.

The native kernel makes one pass over a block and gives the bits of the torch form. Shape letters: D numbers of a
tensor, B blocks of S = 256.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .native import native, runs_native, threads

BLOCK = 256
_CUT = 19  # bits of a float that its code is without
_FIRST, _SECOND = 0x3C000000, 0x38000000  # the smallest floats: 2^-7, 2^-15
_FIRST_BASE, _SECOND_BASE = 2.0**-7, 2.0**-15 - 2.0**-19
_FIRST_TOP, _SECOND_TOP = 1.9375 - _FIRST_BASE, 1.875 - _SECOND_BASE  # of codes 127 and 254
_LOW = 0xFFFFFFFF
_LEAST = 1e-30  # a block whose largest number is not above this counts as zeros


class Moment(NamedTuple):
    """code_BS uint8, int8 of Muon's momentum; scale_B float32: the largest number of each block."""

    code_BS: Tensor
    scale_B: Tensor

    @classmethod
    def zeros(cls, like: Tensor, dtype: torch.dtype = torch.uint8) -> Moment:
        """Of as many numbers as `like` has, where it is."""
        blocks = -(-like.numel() // BLOCK)
        return cls(torch.zeros(blocks, BLOCK, dtype=dtype, device=like.device),
                   torch.zeros(blocks, device=like.device))


def adamw8_(weight: Tensor, gradient: Tensor, first: Moment, second: Moment, step: int, *, lr: float,
            betas: tuple[float, float], eps: float, weight_decay: float, seed: int = 0) -> None:
    """Take step number `step` (from 1) of AdamW (arXiv 1711.05101), with eps^2 under the root of the second moment in
    place of eps beside it: weight and moments are written to. Weight and gradient are FP32, or both BF16: then the new
    weight is `rounded` with `seed`."""
    _check(weight, gradient, torch.uint8, first, second)
    beta1, beta2 = betas
    unbiased = 1 - beta2**step
    decay, size, least = 1 - lr * weight_decay, lr / (1 - beta1**step) * unbiased**0.5, eps * eps * unbiased
    low_seed = hashed(step)
    if runs_native(weight, gradient, *first, *second):
        native.adamw8(weight.data_ptr(), gradient.data_ptr(), weight.dtype == torch.bfloat16, weight.numel(),
                      *(t.data_ptr() for t in first + second),
                      [decay, size, beta1, beta2, 1 - beta1, 1 - beta2, least], low_seed, seed, threads())
        return
    g = _blocks(gradient.float())
    m = first_of(first, beta1) + g * (1 - beta1)
    v = second_of(second, beta2) + g * g * (1 - beta2)
    moved = _blocks(weight.float()) * decay - m * over_root(v + least, size)
    moved = moved.flatten()[: weight.numel()].view_as(weight)
    weight.copy_(moved if weight.dtype == torch.float32 else rounded(moved, seed))
    first.scale_B.copy_(m.abs().amax(1))
    near = (m.abs() * _inverse(first, _FIRST_TOP) + _FIRST_BASE).view(torch.int32)
    first.code_BS.copy_((near + (1 << _CUT - 1) >> _CUT & 127) + 128 * m.signbit())
    set_second_(second, v, low_seed)


def set_second_(moment: Moment, second: Tensor, seed: int) -> None:
    """Keep second moments, FP32, in codes: rounded up with the probability that keeps their mean."""
    v_BS = _blocks(second)
    moment.scale_B.copy_(v_BS.amax(1))
    low = (v_BS * _inverse(moment, _SECOND_TOP) + _SECOND_BASE).clamp_min(2.0**-15).view(torch.int32)
    moment.code_BS.copy_(low + (draws(low.numel(), seed, low.device).view_as(low) >> 32 - _CUT) >> _CUT & 255)


def first_of(moment: Moment, factor: float = 1.0) -> Tensor:
    """The first moments that the codes stand for, times `factor`. FP32, of the codes' shape."""
    code_BS = moment.code_BS.int()
    m_BS = _float(_FIRST, code_BS & 127) - _FIRST_BASE
    return torch.where(code_BS > 127, -m_BS, m_BS) * (moment.scale_B[:, None] * factor * (1 / _FIRST_TOP))


def second_of(moment: Moment, factor: float = 1.0) -> Tensor:
    """The same of second moments."""
    v_BS = _float(_SECOND, moment.code_BS.int()) - _SECOND_BASE
    return v_BS * (moment.scale_B[:, None] * factor * (1 / _SECOND_TOP))


def moved_(weight: Tensor, by: Tensor, seed: int, *, decay: float, size: float) -> None:
    """BF16 weights become themselves times `decay` minus FP32 `by` times `size`, `rounded` with `seed`."""
    if (weight.shape, weight.dtype, by.dtype) != (by.shape, torch.bfloat16, torch.float32):
        raise ValueError(f"weights must be bfloat16, and what moves them float32 of their shape, got {weight.dtype} "
                         f"{list(weight.shape)} and {by.dtype} {list(by.shape)}")
    if runs_native(weight, by):
        native.moved(weight.data_ptr(), by.data_ptr(), weight.numel(), decay, size, seed, threads())
    else:
        weight.copy_(rounded(weight.float() * decay - by * size, seed))


def rounded(x: Tensor, seed: int) -> Tensor:
    """FP32 -> BF16, up or down with the probability that keeps the mean: a step is often less than half of what BF16
    can tell apart, and would be lost by rounding to the nearest. The draw is a hash of seed and place."""
    h = draws(x.numel(), seed, x.device)
    h = (h ^ h >> 15) * 0x846CA68B & _LOW
    bits = (x.flatten().view(torch.int32) + ((h ^ h >> 16) >> 16) & _LOW) >> 16
    return ((bits ^ 0x8000) - 0x8000).short().view(torch.bfloat16).view_as(x)


def momentum8(gradient: Tensor, momentum: Moment, beta: float) -> Tensor:
    """Momentum becomes beta times itself plus 1 - beta times the gradient; returns Nesterov's direction, the same sum
    once more. FP32, of the gradient's shape."""
    _check(gradient, gradient, torch.int8, momentum)
    if runs_native(gradient, *momentum):
        ahead = torch.empty_like(gradient)
        native.momentum8(gradient.data_ptr(), gradient.numel(), *(t.data_ptr() for t in momentum), beta, 1 - beta,
                         ahead.data_ptr(), threads())
        return ahead
    g = _blocks(gradient) * (1 - beta)
    m = momentum.code_BS.float() * (momentum.scale_B[:, None] * (1 / 127)) * beta + g
    momentum.scale_B.copy_(m.abs().amax(1))
    momentum.code_BS.copy_((m * _inverse(momentum, 1.0) * 127).round())
    return (m * beta + g).flatten()[: gradient.numel()].view_as(gradient)


def _check(weight: Tensor, gradient: Tensor, codes: torch.dtype, *moments: Moment) -> None:
    if weight.shape != gradient.shape or {weight.dtype, gradient.dtype} not in ({torch.float32}, {torch.bfloat16}):
        raise ValueError(f"weights and gradients must be float32 or bfloat16 of one shape, got {weight.dtype} "
                         f"{list(weight.shape)} and {gradient.dtype} {list(gradient.shape)}")
    blocks = -(-weight.numel() // BLOCK)
    for code_BS, scale_B in moments:
        if code_BS.shape != (blocks, BLOCK) or scale_B.shape != (blocks,) or scale_B.dtype != torch.float32:
            raise ValueError(f"moments of {weight.numel()} numbers must be codes [{blocks}, {BLOCK}] and float32 "
                             f"scales [{blocks}], got {list(code_BS.shape)} and {scale_B.dtype} {list(scale_B.shape)}")
    if {moment.code_BS.dtype for moment in moments} != {codes}:
        raise ValueError(f"codes must be {codes}, got {[moment.code_BS.dtype for moment in moments]}")


def _blocks(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x.flatten(), (0, -x.numel() % BLOCK)).view(-1, BLOCK)


def _inverse(moment: Moment, top: float) -> Tensor:
    scale_B1 = moment.scale_B[:, None]
    return torch.where((scale_B1 > _LEAST) & (scale_B1 < torch.inf), 1 / scale_B1 * top, 0.0)


def _float(smallest: int, code: Tensor) -> Tensor:
    return (smallest + (code << _CUT)).view(torch.float32)


def over_root(x: Tensor, size: float) -> Tensor:
    """size / root of positive numbers, to 7e-7: from their bits (Jan Kadlec's constants), then a step of Newton's."""
    y = (0x5F1FFFF9 - (x.view(torch.int32) >> 1)).view(torch.float32)
    y = y * (2.38924456 - x * y * y)
    size_ = torch.tensor(size)  # products of float32, as the kernel has them
    return y * (size_ * 1.05592838 - x * (size_ * 0.174421338) * y * y)


def hashed(x: int) -> int:
    """32 bits (Chris Wellons, "lowbias32")."""
    x &= _LOW
    x = (x ^ x >> 16) * 0x7FEB352D & _LOW
    x = (x ^ x >> 15) * 0x846CA68B & _LOW
    return x ^ x >> 16


def draws(count: int, seed: int, device: torch.device) -> Tensor:
    """32 bits of each place, int64."""
    return torch.arange(count, device=device) * 0x9E3779B9 + seed & _LOW
