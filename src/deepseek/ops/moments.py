"""Optimizer steps whose moments are kept in 8 bits, by blocks of 256 numbers with a scale of their own.

    Muon's momentum       linear: code c of -127 … 127 is c / 127 of the block's largest
    AdamW's first moment  c |c| / 127^2: steps that shrink with the number, down to 6e-5 of the largest
    AdamW's second one    (c / 255)^4, as the square of its root, down to 1.5e-5 of the largest root

Momentum needs no more than linear codes, AdamW needs small numbers told apart (arXiv 2110.02861; 2509.23106). The
second moment moves by a small share of itself in a step, often less than a code: it is rounded up with the probability
that keeps its mean, drawn from a hash of place and step, so that it does not stand still and a resumed run draws the
same. What is above zero never becomes zero, or a first moment beside it would be divided by nothing.

The native kernel makes one pass over a block and gives the bits of the torch form, but for square roots, which torch
may round otherwise. Shape letters: D numbers of a tensor, B blocks of S = 256.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .native import native, runs_native, threads

BLOCK = 256
_LEAST = 1e-30  # a block whose largest number is not above this counts as zeros


class Moment(NamedTuple):
    """code_BS int8 (with a sign) or uint8, scale_B float32: the largest number of each block, of the second moment its
    root."""

    code_BS: Tensor
    scale_B: Tensor

    @classmethod
    def zeros(cls, like: Tensor, *, signed: bool = True) -> Moment:
        """Of as many numbers as `like` has, where it is."""
        blocks = -(-like.numel() // BLOCK)
        return cls(torch.zeros(blocks, BLOCK, dtype=torch.int8 if signed else torch.uint8, device=like.device),
                   torch.zeros(blocks, device=like.device))


def adamw8_(weight: Tensor, gradient: Tensor, first: Moment, second: Moment, step: int, *, lr: float,
            betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Take step number `step` (from 1) of AdamW (arXiv 1711.05101): weight and moments are written to. FP32."""
    _check(weight, gradient, first, second)
    beta1, beta2 = betas
    decay, size = 1 - lr * weight_decay, lr / (1 - beta1**step)
    root_scale = (1 - beta2**step) ** -0.5
    seed = step * 0x85EBCA6B & 0xFFFFFFFF
    if runs_native(weight, gradient, *first, *second):
        native.adamw8(weight.data_ptr(), gradient.data_ptr(), weight.numel(), *(t.data_ptr() for t in first + second),
                      [decay, size, beta1, beta2, 1 - beta1, 1 - beta2, root_scale, eps], seed, threads())
        return
    g = _blocks(gradient)
    c, k = first.code_BS.float(), second.code_BS.float()
    m = c * c.abs() * (first.scale_B[:, None] * (1 / 127**2)) * beta1 + g * (1 - beta1)
    u = k * k * (second.scale_B[:, None] * (1 / 255**2))
    u = (u * u * beta2 + g * g * (1 - beta2)).sqrt()
    moved = _blocks(weight) * decay - m / (u * root_scale + eps) * size
    weight.copy_(moved.flatten()[: weight.numel()].view_as(weight))
    for scale_B, t in ((first.scale_B, m), (second.scale_B, u)):
        scale_B.copy_(t.abs().amax(1))
    first.code_BS.copy_(((m.abs() * _inverse(first)).sqrt() * 127).round().copysign(m))
    share = u * _inverse(second)
    x = share.sqrt() * 255
    k = x.floor()
    k4, above4 = (k * k).square(), ((k + 1) * (k + 1)).square()
    up = (x * x).square() - k4 > _dither(k.numel(), seed, k.device).view_as(k) * (above4 - k4)
    second.code_BS.copy_((k + up).maximum((share > 0).float()).clamp(max=255))


def momentum8(gradient: Tensor, momentum: Moment, beta: float) -> Tensor:
    """Momentum becomes beta times itself plus 1 - beta times the gradient; returns Nesterov's direction, the same sum
    once more. FP32, of the gradient's shape."""
    _check(gradient, gradient, momentum)
    if runs_native(gradient, *momentum):
        ahead = torch.empty_like(gradient)
        native.momentum8(gradient.data_ptr(), gradient.numel(), *(t.data_ptr() for t in momentum), beta, 1 - beta,
                         ahead.data_ptr(), threads())
        return ahead
    g = _blocks(gradient) * (1 - beta)
    m = momentum.code_BS.float() * (momentum.scale_B[:, None] * (1 / 127)) * beta + g
    momentum.scale_B.copy_(m.abs().amax(1))
    momentum.code_BS.copy_((m * _inverse(momentum) * 127).round())
    return (m * beta + g).flatten()[: gradient.numel()].view_as(gradient)


def _check(weight: Tensor, gradient: Tensor, *moments: Moment) -> None:
    if weight.shape != gradient.shape or {weight.dtype, gradient.dtype} != {torch.float32}:
        raise ValueError(f"weights and gradients must be float32 of one shape, got {weight.dtype} {list(weight.shape)} "
                         f"and {gradient.dtype} {list(gradient.shape)}")
    blocks = -(-weight.numel() // BLOCK)
    for code_BS, scale_B in moments:
        if code_BS.shape != (blocks, BLOCK) or scale_B.shape != (blocks,) or scale_B.dtype != torch.float32:
            raise ValueError(f"moments of {weight.numel()} numbers must be codes [{blocks}, {BLOCK}] and float32 "
                             f"scales [{blocks}], got {list(code_BS.shape)} and {scale_B.dtype} {list(scale_B.shape)}")
    signed = [moment.code_BS.dtype for moment in moments]
    if signed != [torch.int8, torch.uint8][: len(signed)]:
        raise ValueError(f"codes must be int8, those of second moments uint8, got {signed}")


def _blocks(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x.flatten(), (0, -x.numel() % BLOCK)).view(-1, BLOCK)


def _inverse(moment: Moment) -> Tensor:
    scale_B1 = moment.scale_B[:, None]
    return torch.where((scale_B1 > _LEAST) & (scale_B1 < torch.inf), 1 / scale_B1, 0.0)


def _dither(count: int, seed: int, device: torch.device) -> Tensor:
    """In [0, 1), of 24 bits: a hash of each place (its constants: Chris Wellons, "lowbias32")."""
    low = 0xFFFFFFFF
    h = (torch.arange(count, device=device) * 0x9E3779B9 + seed) & low
    h ^= h >> 16
    h = h * 0x7FEB352D & low
    h ^= h >> 15
    h = h * 0x846CA68B & low
    h ^= h >> 16
    return (h >> 8).float() * 2.0**-24
