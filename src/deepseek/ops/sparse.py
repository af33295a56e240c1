"""Chunks of 4,096 numbers of which the 64 largest are kept: places, and one of four bins a number with the bins' means.

The bins are positive and negative, above and not above the chunk's mean magnitude. Of equal magnitudes the first are
kept; the last chunk is filled up with zeros. A payload is the means of all chunks, BF16 [N, 4], then the places in
order, two in three bytes, then the codes, four a byte, each with the first in the lowest bits.

The native kernel and the torch form give the same bytes: sums are in FP64 (two_bits.py). Shape letters: C numbers, N
chunks of S = 4,096, K = 64 kept, M bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .native import native, runs_native, threads
from .two_bits import bin_means, check_coded, check_payload, pack2, unpack2, wanted_of

CHUNK, BEST = 4096, 64


def encode(value_C: Tensor, less_C: Tensor | None = None, error_C: Tensor | None = None, decay: float = 1.0
           ) -> tuple[Tensor, Tensor] | None:
    """The payload [M] of value - less + decay * error, and what it leaves out, [C]. All FP32. None where a number to be
    coded is not finite."""
    given = check_coded(1, value_C, less_C, error_C)
    if runs_native(*given):
        payload, left_C = value_C.new_empty(nbytes(value_C.shape), dtype=torch.uint8), torch.empty_like(value_C)
        less, error = (0 if x_C is None else x_C.data_ptr() for x_C in (less_C, error_C))
        finite = native.encode_sparse(value_C.data_ptr(), less, error, decay, len(value_C), payload.data_ptr(),
                                      left_C.data_ptr(), threads())
        return (payload, left_C) if finite else None
    wanted_C = wanted_of(value_C, less_C, error_C, decay)
    if wanted_C is None:
        return None
    x_NS = torch.nn.functional.pad(wanted_C, (0, -len(wanted_C) % CHUNK)).view(-1, CHUNK)
    size_NS = x_NS.abs()
    least_N1 = size_NS.topk(BEST, 1).values[:, -1:]
    above_NS, equal_NS = size_NS > least_N1, size_NS == least_N1
    missing_N1 = BEST - above_NS.sum(1, keepdim=True)
    chosen_NS = above_NS | equal_NS & (equal_NS.cumsum(1) <= missing_N1)
    place_NK = chosen_NS.nonzero()[:, 1].view(-1, BEST)
    x_NK = x_NS.gather(1, place_NK)
    size_NK = x_NK.abs()
    code_NK = 2 * (x_NK > 0).byte() + (size_NK > size_NK.double().mean(1, keepdim=True).float()).byte()
    payload = torch.cat([bin_means(x_NK, code_NK).view(torch.uint8).flatten(), pack12(place_NK.flatten()),
                         pack2(code_NK.view(-1, 4))])
    return payload, wanted_C - decode(payload, wanted_C.shape)


def decode(payload: Tensor, shape: Sequence[int], weight: float = 1.0, onto_C: Tensor | None = None) -> Tensor:
    """What the payload of so many numbers stands for, times `weight`: FP32 [C], new, or added to `onto`."""
    check_payload(payload, nbytes(shape), shape, onto_C)
    out_C = torch.zeros(*shape, device=payload.device) if onto_C is None else onto_C
    if runs_native(payload, out_C):
        native.add_sparse(payload.data_ptr(), len(out_C), weight, out_C.data_ptr(), threads())
        return out_C
    chunks = -(-len(out_C) // CHUNK)
    levels, places, codes = payload.split([8 * chunks, chunks * BEST * 3 // 2, chunks * BEST // 4])
    level_N4 = levels.clone().view(torch.bfloat16).float().view(chunks, 4) * weight  # from any address
    x_NK = level_N4.gather(1, unpack2(codes).view(chunks, BEST).long())
    x_NS = torch.zeros(chunks, CHUNK, device=payload.device).scatter_(1, unpack12(places).view(chunks, BEST), x_NK)
    return out_C.add_(x_NS.flatten()[: len(out_C)])


def nbytes(shape: Sequence[int]) -> int:
    """Of a payload."""
    return -(-shape[0] // CHUNK) * (8 + BEST * 3 // 2 + BEST // 4)


def pack12(place_M: Tensor) -> Tensor:
    """Two numbers below 4,096 in three bytes; M is even."""
    a, b = place_M.view(-1, 2).unbind(1)
    return torch.stack([a & 255, a >> 8 | (b & 15) << 4, b >> 4], 1).to(torch.uint8).flatten()


def unpack12(packed_M: Tensor) -> Tensor:
    x, y, z = packed_M.view(-1, 3).long().unbind(1)
    return torch.stack([x | (y & 15) << 8, y >> 4 | z << 4], 1).flatten()
