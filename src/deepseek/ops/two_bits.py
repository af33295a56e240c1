"""Rows of numbers in two bits each: one of four bins a number, and the bins' means.

The edges of the bins are the row's mean and 0.98 standard deviations to either side of it, which of all edges lose
least of normally distributed numbers (Max, 1960). A payload is the means, BF16 [N, 4], then the codes, four a byte, the
first in the lowest bits; the codes of a row follow those of the one before, within a byte too.

The native kernel makes one pass over a row. Its sums are in FP64, in one order on every instruction set; those of the
torch form are in torch's order, which moves a bit in one of some hundred million rows. Decoding is a table look-up, the
same everywhere. Shape letters: N rows of R numbers, M bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .native import native, runs_native, threads

EDGE = 0.98  # of an outer bin, in standard deviations


def encode(value_NR: Tensor, less_NR: Tensor | None = None, error_NR: Tensor | None = None, decay: float = 1.0
           ) -> tuple[Tensor, Tensor] | None:
    """The payload [M] of value - less + decay * error, and what it leaves out, [N, R]. All FP32. None where a number to
    be coded is not finite."""
    given = check_coded(2, value_NR, less_NR, error_NR)
    if runs_native(*given):
        payload, left_NR = value_NR.new_empty(nbytes(value_NR.shape), dtype=torch.uint8), torch.empty_like(value_NR)
        less, error = (0 if x_NR is None else x_NR.data_ptr() for x_NR in (less_NR, error_NR))
        finite = native.encode_two_bits(value_NR.data_ptr(), less, error, decay, *value_NR.shape, payload.data_ptr(),
                                        left_NR.data_ptr(), threads())
        return (payload, left_NR) if finite else None
    wanted_NR = wanted_of(value_NR, less_NR, error_NR, decay)
    if wanted_NR is None:
        return None
    wide_NR = wanted_NR.double()
    mean_N1, edge_N1 = wide_NR.mean(1, keepdim=True), EDGE * wide_NR.std(1, keepdim=True, correction=0)
    code_NR = sum((wanted_NR > limit_N1.float()).byte() for limit_N1 in (mean_N1 - edge_N1, mean_N1, mean_N1 + edge_N1))
    assert isinstance(code_NR, Tensor)
    code = torch.nn.functional.pad(code_NR.flatten(), (0, -code_NR.numel() % 4))
    payload = torch.cat([bin_means(wide_NR, code_NR).view(torch.uint8).flatten(), pack2(code.view(-1, 4))])
    return payload, wanted_NR - decode(payload, wanted_NR.shape)


def decode(payload: Tensor, shape: Sequence[int], weight: float = 1.0, onto_NR: Tensor | None = None) -> Tensor:
    """What the payload of rows stands for, times `weight`: FP32 [N, R], new, or added to `onto`."""
    check_payload(payload, nbytes(shape), shape, onto_NR)
    rows, row = shape
    if runs_native(payload, *([] if onto_NR is None else [onto_NR])):
        out_NR = payload.new_empty(rows, row, dtype=torch.float32) if onto_NR is None else onto_NR
        native.decode_two_bits(payload.data_ptr(), rows, row, weight, onto_NR is not None, out_NR.data_ptr(), threads())
        return out_NR
    level_N4 = payload[: 8 * rows].clone().view(torch.bfloat16).float().view(rows, 4) * weight  # at any address
    found_NR = level_N4.gather(1, unpack2(payload[8 * rows :])[: rows * row].view(rows, row).long())
    return found_NR if onto_NR is None else onto_NR.add_(found_NR)


def nbytes(shape: Sequence[int]) -> int:
    """Of a payload."""
    rows, row = shape
    return 8 * rows + -(-rows * row // 4)


def check_coded(ndim: int, value: Tensor, less: Tensor | None, error: Tensor | None) -> list[Tensor]:
    """Those of them that there are. Raises ValueError where they do not fit together."""
    given = [x for x in (value, less, error) if x is not None]
    if any(x.shape != value.shape or x.dtype != torch.float32 or x.ndim != ndim for x in given):
        raise ValueError(f"numbers to be coded must be float32 and of one shape, of {ndim} dimensions, got "
                         + ", ".join(f"{x.dtype} {list(x.shape)}" for x in given))
    return given


def check_payload(payload: Tensor, size: int, shape: Sequence[int], onto: Tensor | None) -> None:
    """Raise ValueError where they do not fit together."""
    if payload.shape != (size,) or payload.dtype != torch.uint8:
        raise ValueError(f"a payload of {list(shape)} must be {size} bytes, got {payload.dtype} {list(payload.shape)}")
    if onto is not None and (onto.shape != tuple(shape) or onto.dtype != torch.float32):
        raise ValueError(f"a payload of {list(shape)} must be added to float32 of that shape, got {onto.dtype} "
                         f"{list(onto.shape)}")


def wanted_of(value: Tensor, less: Tensor | None, error: Tensor | None, decay: float) -> Tensor | None:
    """value - less + decay * error, or None where that is not finite."""
    wanted = value if less is None else value - less
    if error is not None:
        wanted = wanted + decay * error
    return wanted if bool(wanted.isfinite().all()) else None


def bin_means(x_NR: Tensor, code_NR: Tensor) -> Tensor:
    """Mean of each row's numbers in each of four bins, summed in FP64, [N, 4] in BF16; 0 for an empty one."""
    parts = [code_NR == code for code in range(4)]
    sums_N4 = torch.stack([(x_NR.double() * part).sum(1) for part in parts], 1)
    return (sums_N4 / torch.stack([part.sum(1).clamp(min=1) for part in parts], 1)).float().bfloat16()


def pack2(code_N4: Tensor) -> Tensor:
    """Four codes a byte, the first in the lowest bits."""
    return code_N4[:, 0] | code_N4[:, 1] << 2 | code_N4[:, 2] << 4 | code_N4[:, 3] << 6


def unpack2(packed_N: Tensor) -> Tensor:
    return torch.stack([packed_N >> shift & 3 for shift in (0, 2, 4, 6)], 1).flatten()
