"""Causal attention for training and prefill, where keys and values may differ in width (MLA).

torch's fused kernels want one width for queries, keys and values; MLA has two (192 and 128 in V3), so torch falls back
to a form that holds all scores of the batch. `causal_attention` walks over the batch instead: the scores of one
sequence's heads stay in the cache, forward and backward, and the blocks above the diagonal are never computed.

Shape letters: B batch, N heads, T queries, S keys, D query/key width, W value width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, scaled_dot_product_attention

from .linear import to_compute_dtype
from .native import dense_rows, dtype_code, native, threads, trains_native

BLOCK = 128  # queries a block: one head's [128, 256] scores are 128 KB
LONGEST_SAVED = 512  # up to here in blocks, the probabilities kept for the backward pass; beyond, torch's flash kernel


def _in_blocks(q_BNTD: Tensor, k_BNTD: Tensor, v_BNTW: Tensor, scale: float, saved: list[Tensor] | None) -> Tensor:
    """Exact softmax attention in query blocks; block i sees the keys up to its own end only. saved: takes the
    probabilities of each block."""
    batch, heads, length, _ = q_BNTD.shape
    out = q_BNTD.new_empty(batch, length, heads, v_BNTW.shape[-1])
    above = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=q_BNTD.device).triu_(1)
    for b in range(batch):
        q, k, v = to_compute_dtype(q_BNTD[b]) * scale, to_compute_dtype(k_BNTD[b]), to_compute_dtype(v_BNTW[b])
        for lo in range(0, length, BLOCK):
            hi = min(lo + BLOCK, length)
            s = torch.bmm(q[:, lo:hi], k[:, :hi].transpose(1, 2))
            s[:, :, lo:].masked_fill_(above[: hi - lo, : hi - lo], -math.inf)
            p = torch.softmax(s, -1, dtype=torch.float32).to(q_BNTD.dtype)
            out[b, lo:hi] = torch.bmm(to_compute_dtype(p), v[:, :hi]).transpose(0, 1)
            if saved is not None:
                saved.append(p)
    return out.transpose(1, 2)


class _CausalAttention(torch.autograd.Function):
    """`_in_blocks` with a gradient."""

    @staticmethod
    def forward(ctx: Any, q_BNTD: Tensor, k_BNTD: Tensor, v_BNTW: Tensor, scale: float) -> Tensor:
        saved: list[Tensor] = []
        out = _in_blocks(q_BNTD, k_BNTD, v_BNTW, scale, saved)
        ctx.save_for_backward(q_BNTD, k_BNTD, v_BNTW, *saved)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BNTW: Tensor) -> tuple[Tensor | None, ...]:
        q_BNTD, k_BNTD, v_BNTW, *saved = ctx.saved_tensors
        probs = reversed(saved)
        batch, _, length, _ = q_BNTD.shape
        dq, dk, dv = torch.empty_like(q_BNTD), torch.empty_like(k_BNTD), torch.empty_like(v_BNTW)
        for b in reversed(range(batch)):
            q, k, v, do = map(to_compute_dtype, (q_BNTD[b], k_BNTD[b], v_BNTW[b], dout_BNTW[b]))
            q = q * ctx.scale
            for lo in reversed(range(0, length, BLOCK)):  # the last block sees all keys: it starts the sums
                hi = min(lo + BLOCK, length)
                p = to_compute_dtype(next(probs))
                do_block = do[:, lo:hi]
                dv_block = torch.bmm(p.transpose(1, 2), do_block)
                dp = torch.bmm(do_block, v[:, :hi].transpose(1, 2))
                ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
                dq[b, :, lo:hi] = torch.bmm(ds, k[:, :hi]).mul_(ctx.scale)
                dk_block = torch.bmm(ds.transpose(1, 2), q[:, lo:hi])
                if hi == length:
                    dk_b, dv_b = dk_block, dv_block
                else:
                    dk_b[:, :hi] += dk_block
                    dv_b[:, :hi] += dv_block
            dk[b], dv[b] = dk_b, dv_b
        return dq, dk, dv, None


class _NativeAttention(torch.autograd.Function):
    """The same arithmetic in one call (csrc/training.cpp): a head of a sequence is a task, nothing is copied."""

    @staticmethod
    def forward(ctx: Any, q_BNTD: Tensor, k_BNTD: Tensor, v_BNTW: Tensor, scale: float) -> Tensor:
        batch, heads, length, _ = q_BNTD.shape
        out = q_BNTD.new_empty(batch, length, heads, v_BNTW.shape[-1]).transpose(1, 2)
        p_BNTT = q_BNTD.new_empty(batch, heads, length, length)
        native.attention_forward(*map(_steps, (q_BNTD, k_BNTD, v_BNTW, out)), dtype_code(out), batch, heads, length,
                                 scale, p_BNTT.data_ptr(), threads())
        ctx.save_for_backward(q_BNTD, k_BNTD, v_BNTW, p_BNTT)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BNTW: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, p_BNTT = ctx.saved_tensors
        batch, heads, length, _ = q.shape
        dq, dk, dv = (t.new_empty(batch, length, heads, t.shape[-1]).transpose(1, 2) for t in (q, k, v))
        dout = dense_rows(dout_BNTW.to(q.dtype))  # held until the kernel has read it
        native.attention_backward(*map(_steps, (q, k, v, dout, dq, dk, dv)), dtype_code(q), batch, heads, length,
                                  ctx.scale, p_BNTT.data_ptr(), threads())
        return dq, dk, dv, None


def _steps(t_BNTD: Tensor) -> tuple[int, ...]:
    return t_BNTD.data_ptr(), *t_BNTD.stride()[:3], t_BNTD.shape[-1]


def attention_reference(q_BNTD: Tensor, k_BNSD: Tensor, v_BNSW: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Reference: softmax(q k^T * scale) v with FP32 scores; mask [.., T, S] True where a query may look."""
    s = (q_BNTD.float() @ k_BNSD.float().transpose(-1, -2)) * scale
    if mask is None:
        mask = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril(s.shape[-1] - s.shape[-2])
    p = s.masked_fill(~mask, torch.finfo(s.dtype).min).softmax(-1)
    return (p @ v_BNSW.float()).to(q_BNTD.dtype)


def causal_attention(
    q_BNTD: Tensor, k_BNSD: Tensor, v_BNSW: Tensor, scale: float, mask: Tensor | None = None
) -> Tensor:
    """softmax(q k^T * scale) v, [B, N, T, W].

    mask: None for plain causal over T == S; else a boolean tensor that broadcasts to [B, N, T, S], True where a query
    may look. A query that may look nowhere (padding) gets finite rubbish, never NaN.
    """
    if mask is None and q_BNTD.device.type == "cpu" and q_BNTD.shape[2] <= LONGEST_SAVED:
        if not torch.is_grad_enabled() or not (q_BNTD.requires_grad or k_BNSD.requires_grad or v_BNSW.requires_grad):
            return _in_blocks(q_BNTD, k_BNSD, v_BNSW, scale, None)
        fast = scale > 0 and trains_native(q_BNTD, k_BNSD, v_BNSW)
        return (_NativeAttention if fast else _CausalAttention).apply(q_BNTD, k_BNSD, v_BNSW, scale)
    width = v_BNSW.shape[-1]
    v = pad(v_BNSW, (0, k_BNSD.shape[-1] - width)) if width < k_BNSD.shape[-1] else v_BNSW
    if mask is not None:  # SDPA gives NaN for a row without any key: let such a row look everywhere
        mask = mask | ~mask.any(-1, keepdim=True)
    out = scaled_dot_product_attention(q_BNTD, k_BNSD, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out[..., :width]
