"""Multi-head latent attention over a latent cache, where kv_b_proj is quantized (model/mla.py explains both forms).

Scores, exponentials and sums are FP32, over blocks of 128 keys that count from the first visible one and are joined in
their order: a query's result depends neither on the queries beside it nor on how a text is cut into calls. Naive
and absorbed differ in rounding.

Shape letters: B batch, T tokens, N heads, R latent rank, P rotary width, D = nope + P, C = R + P, S positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .native import native, runs_native, threads
from .norm import rms_norm
from .panels import matrix_bytes
from .quantized import quantized_linear
from .registry import register_op
from .rotary import rotate

BLOCK = 128  # positions of a block (csrc/kernels.h, kKeys)


def _probabilities(scores_BNTS: Tensor, first_B: Tensor, past_B: Tensor) -> Tensor:
    tokens, length = scores_BNTS.shape[2:]
    position_S, last_BT = torch.arange(length), past_B.unsqueeze(1) + torch.arange(tokens)
    seen_BTS = (position_S >= first_B[:, None, None]) & (position_S <= last_BT.unsqueeze(-1))
    probs = scores_BNTS.masked_fill(~seen_BTS.unsqueeze(1), -torch.inf).softmax(-1)
    return probs.masked_fill(~seen_BTS.any(-1)[:, None, :, None], 0.0)  # padding sees nothing


def latent_attention_reference(
    q_latent: Tensor, q_rope: Tensor, cache: Tensor, first_B: Tensor, past_B: Tensor, scale: float
) -> Tensor:
    scores = torch.einsum("btnc,bsc->bnts", torch.cat((q_latent, q_rope), -1), cache) * scale
    probs = _probabilities(scores, first_B, past_B)
    return torch.einsum("bnts,bsr->btnr", probs, cache[..., : q_latent.shape[-1]]).contiguous()


def naive_attention_reference(
    q_BTND: Tensor, q_rope: Tensor, cache: Tensor, kv_b: Tensor, value: int, first_B: Tensor, past_B: Tensor,
    scale: float, bits: int
) -> Tensor:
    rope, heads = q_rope.shape[-1], q_BTND.shape[2]
    nope, rank = q_BTND.shape[-1] - rope, cache.shape[-1] - rope
    kv = quantized_linear(cache[..., :rank], kv_b, heads * (nope + value), bits=bits).unflatten(-1, (heads, -1))
    scores = torch.einsum("btnd,bsnd->bnts", q_BTND[..., :nope], kv[..., :nope])
    scores = (scores + torch.einsum("btnp,bsp->bnts", q_rope, cache[..., rank:])) * scale
    return torch.einsum("bnts,bsnw->btnw", _probabilities(scores, first_B, past_B), kv[..., nope:]).contiguous()


def _check_positions(first_B: Tensor, past_B: Tensor, batch: int, tokens: int, length: int) -> None:
    if first_B.dtype != torch.int64 or past_B.dtype != torch.int64 or not len(first_B) == len(past_B) == batch:
        raise ValueError(f"first and past must be int64 [{batch}]")
    past, first = past_B.tolist(), first_B.tolist()
    if batch and (max(past) + tokens > length or min(first) < 0 or min(past) < 0):
        raise ValueError(f"positions must satisfy first >= 0, past >= 0 and past + {tokens} <= {length}, got "
                         f"first {first}, past {past}")


class Sequences(NamedTuple):
    """Sequences of a call and where their cached rows lie (csrc/attention.h); int64 tensors.

    Positions count from a sequence's first visible one, in blocks of BLOCK rows. begin [count + 1]: the first of its
    new tokens, which stand side by side; past [count]: that token's position (negative: padding, which sees nothing);
    block_begin [count + 1]: its part of `blocks`, which holds the numbers from the beginning of the cache to a block's
    first row.
    """

    begin: Tensor
    past: Tensor
    block_begin: Tensor
    blocks: Tensor

    @classmethod
    def in_rows(cls, first_B: Tensor, past_B: Tensor, tokens: int, stride: int, width: int) -> Sequences:
        """All with the same number of tokens, rows `width` wide, those of a sequence in one piece, `stride` apart."""
        batch = len(first_B)
        past_B = past_B - first_B
        blocks_B = ((past_B + tokens - 1).clamp(min=0) // BLOCK) + 1
        end_B = blocks_B.cumsum(0)
        sequence = torch.repeat_interleave(torch.arange(batch), blocks_B)
        block = torch.arange(len(sequence)) - (end_B - blocks_B)[sequence]
        return cls(torch.arange(batch + 1) * tokens, past_B, torch.cat((end_B.new_zeros(1), end_B)),
                   sequence * stride + (first_B[sequence] + block * BLOCK) * width)

    def split(self, count: int) -> tuple[Sequences, Sequences]:
        """The first `count` sequences, and the others, whose tokens still count from the first of all."""
        return (Sequences(self.begin[: count + 1], self.past[:count], self.block_begin[: count + 1], self.blocks),
                Sequences(self.begin[count:], self.past[count:], self.block_begin[count:], self.blocks))

    def moved(self) -> Sequences:
        """The same sequences, with token numbers from zero."""
        return self._replace(begin=self.begin - self.begin[0])

    def native(self) -> tuple[int, ...]:
        """Arguments of the kernels."""
        return (*(part.data_ptr() for part in self), len(self.past))


def _rows_suit(cache: Tensor) -> bool:
    return cache.stride()[1:] == (cache.shape[2], 1) and cache.dtype == torch.float32 and cache.device.type == "cpu"


@register_op(lambda q_latent, q_rope, cache, first_B, past_B, scale: q_latent.new_empty(q_latent.shape))
def latent_attention(
    q_latent: Tensor, q_rope: Tensor, cache: Tensor, first_B: Tensor, past_B: Tensor, scale: float
) -> Tensor:
    """Absorbed MLA over the latent cache, [B, T, N, R] float32.

    q_latent [B, T, N, R], q_rope [B, T, N, P], cache [B, >= S, R + P] (rows of a sequence contiguous; rotary keys
    last). Query t of sequence b sees positions first_B[b] … past_B[b] + t; int64 tensors. A query before first_B[b] is
    padding and gets zeros.
    """
    checks.activations("q_latent", q_latent, dense=False), checks.activations("q_rope", q_rope, dense=False)
    batch, tokens, heads, rank = q_latent.shape
    rope = q_rope.shape[-1]
    if q_rope.shape[:3] != q_latent.shape[:3] or cache.shape[0] != batch or cache.shape[2] != rank + rope:
        raise ValueError(f"shapes do not fit: q_latent {list(q_latent.shape)}, q_rope {list(q_rope.shape)}, "
                         f"cache {list(cache.shape)}")
    _check_positions(first_B, past_B, batch, tokens, cache.shape[1])
    if rank % 16 or not _rows_suit(cache) or not runs_native(q_latent, q_rope, first_B, past_B):
        return latent_attention_reference(q_latent, q_rope, cache.float(), first_B, past_B, scale)
    out = torch.empty_like(q_latent)
    sequences = Sequences.in_rows(first_B, past_B, tokens, cache.stride(0), rank + rope)
    native.mla_absorbed(q_latent.data_ptr(), q_rope.data_ptr(), cache.data_ptr(), *sequences.native(), heads, rank,
                        rope, scale, out.data_ptr(), threads())
    return out


@register_op(lambda q_BTND, q_rope, cache, kv_b, value, first_B, past_B, scale, *, bits=4: (
    q_BTND.new_empty(*q_BTND.shape[:3], value)))
def naive_attention(
    q_BTND: Tensor, q_rope: Tensor, cache: Tensor, kv_b: Tensor, value: int, first_B: Tensor, past_B: Tensor,
    scale: float, *, bits: int = 4
) -> Tensor:
    """Naive MLA over the latent cache, [B, T, N, value] float32: every head's keys and values are rebuilt.

    q_BTND [B, T, N, nope + P], whose last P numbers are not read; q_rope, cache, first_B, past_B: as `latent_attention`
    takes them. kv_b: the packed [N (nope + value), R].
    """
    checks.activations("q", q_BTND, dense=False), checks.activations("q_rope", q_rope, dense=False)
    batch, tokens, heads, width = q_BTND.shape
    rope, rank = q_rope.shape[-1], cache.shape[-1] - q_rope.shape[-1]
    nope = width - rope
    if q_rope.shape[:3] != q_BTND.shape[:3] or cache.shape[0] != batch or rank <= 0 or nope < 0:
        raise ValueError(f"shapes do not fit: q {list(q_BTND.shape)}, q_rope {list(q_rope.shape)}, cache "
                         f"{list(cache.shape)}")
    checks.packed_bytes("kv_b", kv_b, matrix_bytes(heads * (nope + value), rank, bits))
    _check_positions(first_B, past_B, batch, tokens, cache.shape[1])
    if not _rows_suit(cache) or not runs_native(q_BTND, q_rope, first_B, past_B, kv_b):
        return naive_attention_reference(q_BTND, q_rope, cache.float(), kv_b, value, first_B, past_B, scale, bits)
    out = q_BTND.new_empty(batch, tokens, heads, value)
    sequences = Sequences.in_rows(first_B, past_B, tokens, cache.stride(0), rank + rope)
    native.mla_naive(q_BTND.data_ptr(), q_rope.data_ptr(), cache.data_ptr(), *sequences.native(), heads, rank, rope,
                     nope, value, kv_b.data_ptr(), bits, scale, out.data_ptr(), threads())
    return out


@register_op(lambda q_BTND, kv_BTC, norm_R, eps, cos_BTP, sin_BTP, interleave, rows_BSC, past: (
    q_BTND.new_empty(*q_BTND.shape[:3], 2 * cos_BTP.shape[-1])), mutates=["rows_BSC"])
def prepare_latents(
    q_BTND: Tensor, kv_BTC: Tensor, norm_R: Tensor, eps: float, cos_BTP: Tensor, sin_BTP: Tensor, interleave: bool,
    rows_BSC: Tensor, past: int
) -> Tensor:
    """The rotated rotary part of q, [B, T, N, rope]; writes [RMSNorm(latent) | rotated key] to rows_BSC[:, past:].

    q_BTND: [..., nope + rope]; kv_BTC: latent and rotary key, R + rope wide; cos, sin: [B or 1, T, rope / 2]; rows_BSC:
    float32, at least past + T rows. Rotated pairs lie as two halves (`rotate`).
    """
    checks.activations("q", q_BTND, dense=False), checks.activations("kv", kv_BTC, dense=False)
    batch, tokens, heads, width = q_BTND.shape
    rank, rope = len(norm_R), 2 * cos_BTP.shape[-1]
    if kv_BTC.shape != (batch, tokens, rank + rope) or rows_BSC.shape[::2] != (batch, rank + rope):
        raise ValueError(f"shapes do not fit: q {list(q_BTND.shape)}, kv {list(kv_BTC.shape)}, rank {rank}, rotary "
                         f"width {rope}, rows {list(rows_BSC.shape)}")
    if rows_BSC.dtype != torch.float32 or past < 0 or past + tokens > rows_BSC.shape[1]:
        raise ValueError(f"rows must be float32 and hold {past} + {tokens}, got {rows_BSC.dtype} "
                         f"{list(rows_BSC.shape)}")
    if cos_BTP.shape != sin_BTP.shape or cos_BTP.shape[:2] not in ((1, tokens), (batch, tokens)) or width < rope:
        raise ValueError(f"cos and sin must be [{batch} or 1, {tokens}, at most {width // 2}], got "
                         f"{list(cos_BTP.shape)} and {list(sin_BTP.shape)}")
    norm_R = norm_R.detach().float()
    rows_lie_together = rows_BSC.stride()[1:] == (rank + rope, 1)
    if runs_native(q_BTND, kv_BTC, norm_R, cos_BTP, sin_BTP) and rows_lie_together and (
            cos_BTP.dtype == sin_BTP.dtype == torch.float32):
        q_rope = q_BTND.new_empty(batch, tokens, heads, rope)
        cos_BTP, sin_BTP = (angle.expand(batch, -1, -1).contiguous() for angle in (cos_BTP, sin_BTP))
        sequences = Sequences.in_rows(torch.zeros(batch, dtype=torch.int64), torch.full((batch,), past), tokens,
                                      rows_BSC.stride(0), rank + rope)
        native.mla_prepare(
            q_BTND.data_ptr(), kv_BTC.data_ptr(), norm_R.data_ptr(), eps, cos_BTP.data_ptr(), sin_BTP.data_ptr(),
            interleave, *sequences.native(), heads, width - rope, rope, rank, q_rope.data_ptr(), rows_BSC.data_ptr(),
            threads())
        return q_rope
    new = rows_BSC[:, past : past + tokens]
    new[..., :rank] = rms_norm(kv_BTC[..., :rank], norm_R, eps)
    new[..., rank:] = rotate(kv_BTC[..., rank:].unsqueeze(2), cos_BTP, sin_BTP, interleave).squeeze(2)
    return rotate(q_BTND[..., width - rope :], cos_BTP, sin_BTP, interleave)


# ---- the same over pages, where the rows of many sequences lie (model/cache.py); native kernels alone ---------------


def prepare_pages(
    q_TND: Tensor, kv_TC: Tensor, norm_R: Tensor, eps: float, cos_TP: Tensor, sin_TP: Tensor, interleave: bool,
    cache: Tensor, sequences: Sequences
) -> Tensor:
    """The rotated rotary part of q, [T, N, rope]; the tokens' rows of the cache are written. `prepare_latents`."""
    tokens, heads, width = q_TND.shape
    rank, rope = len(norm_R), 2 * cos_TP.shape[-1]
    norm_R, cos_TP, sin_TP = norm_R.float(), cos_TP.contiguous(), sin_TP.contiguous()
    _check_pages(cache, q_TND, kv_TC, norm_R, cos_TP, sin_TP)
    assert kv_TC.shape == (tokens, rank + rope) and len(cos_TP) == len(sin_TP) == tokens
    q_rope = q_TND.new_empty(tokens, heads, rope)
    native.mla_prepare(q_TND.data_ptr(), kv_TC.data_ptr(), norm_R.data_ptr(), eps, cos_TP.data_ptr(), sin_TP.data_ptr(),
                       interleave, *sequences.native(), heads, width - rope, rope, rank, q_rope.data_ptr(),
                       cache.data_ptr(), threads())
    return q_rope


def naive_pages(
    q_TND: Tensor, q_rope: Tensor, cache: Tensor, kv_b: Tensor, value: int, sequences: Sequences, scale: float,
    bits: int
) -> Tensor:
    """`naive_attention` over pages, [T, N, value]."""
    (tokens, heads, width), rope = q_TND.shape, q_rope.shape[-1]
    rank, nope = cache.shape[-1] - rope, width - rope
    _check_pages(cache, q_TND, q_rope)
    checks.packed_bytes("kv_b", kv_b, matrix_bytes(heads * (nope + value), rank, bits))
    out = q_TND.new_empty(tokens, heads, value)
    native.mla_naive(q_TND.data_ptr(), q_rope.data_ptr(), cache.data_ptr(), *sequences.native(), heads, rank, rope,
                     nope, value, kv_b.data_ptr(), bits, scale, out.data_ptr(), threads())
    return out


def latent_pages(q_latent: Tensor, q_rope: Tensor, cache: Tensor, sequences: Sequences, scale: float) -> Tensor:
    """`latent_attention` over pages, [T, N, R]."""
    _, heads, rank = q_latent.shape
    _check_pages(cache, q_latent, q_rope)
    assert rank % 16 == 0 and cache.shape[-1] == rank + q_rope.shape[-1]
    out = torch.empty_like(q_latent)
    native.mla_absorbed(q_latent.data_ptr(), q_rope.data_ptr(), cache.data_ptr(), *sequences.native(), heads, rank,
                        q_rope.shape[-1], scale, out.data_ptr(), threads())
    return out


def _check_pages(cache: Tensor, *operands: Tensor) -> None:
    assert runs_native(cache, *operands) and all(t.dtype == torch.float32 for t in (cache, *operands))
