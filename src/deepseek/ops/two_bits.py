"""Rows of numbers in two bits each: one of four bins a number, and the bins' means.

The edges of the bins are the row's mean and 0.98 standard deviations to either side of it, which of all edges lose
least of normally distributed numbers (Max, 1960). A payload is the means, BF16 [N, 4], then the codes, four a byte, the
first in the lowest bits; the codes of a row follow those of the one before, within a byte too.

The native kernel makes one pass over a row. Its sums are in FP64, in one order on every instruction set; those of the
torch form are in torch's order, which moves a bit in one of some hundred million rows. Decoding is a table look-up, the
same everywhere. Shape letters: N rows of R numbers, M bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .native import native, runs_native, threads

EDGE = 0.98  # of an outer bin, in standard deviations


def encode(value_NR: Tensor, less_NR: Tensor | None = None, error_NR: Tensor | None = None, decay: float = 1.0
           ) -> tuple[Tensor, Tensor] | None:
    """The payload [M] of value - less + decay * error, and what it leaves out, [N, R]. All FP32. None where a number to
    be coded is not finite."""
    given = [x_NR for x_NR in (value_NR, less_NR, error_NR) if x_NR is not None]
    if any(x_NR.shape != value_NR.shape or x_NR.dtype != torch.float32 or x_NR.ndim != 2 for x_NR in given):
        raise ValueError("rows to be coded must be float32 and of one shape [N, R], got "
                         + ", ".join(f"{x_NR.dtype} {list(x_NR.shape)}" for x_NR in given))
    if runs_native(*given):
        payload, left_NR = value_NR.new_empty(nbytes(*value_NR.shape), dtype=torch.uint8), torch.empty_like(value_NR)
        less, error = (0 if x_NR is None else x_NR.data_ptr() for x_NR in (less_NR, error_NR))
        finite = native.encode_two_bits(value_NR.data_ptr(), less, error, decay, *value_NR.shape, payload.data_ptr(),
                                        left_NR.data_ptr(), threads())
        return (payload, left_NR) if finite else None
    wanted_NR = value_NR if less_NR is None else value_NR - less_NR
    if error_NR is not None:
        wanted_NR = wanted_NR + decay * error_NR
    if not bool(wanted_NR.isfinite().all()):
        return None
    wide_NR = wanted_NR.double()
    mean_N1, edge_N1 = wide_NR.mean(1, keepdim=True), EDGE * wide_NR.std(1, keepdim=True, correction=0)
    code_NR = sum((wanted_NR > limit_N1.float()).byte() for limit_N1 in (mean_N1 - edge_N1, mean_N1, mean_N1 + edge_N1))
    assert isinstance(code_NR, Tensor)
    code = torch.nn.functional.pad(code_NR.flatten(), (0, -code_NR.numel() % 4))
    payload = torch.cat([bin_means(wide_NR, code_NR).view(torch.uint8).flatten(), pack2(code.view(-1, 4))])
    return payload, wanted_NR - decode(payload, *wanted_NR.shape)


def decode(payload: Tensor, rows: int, row: int, weight: float = 1.0, onto_NR: Tensor | None = None) -> Tensor:
    """What the payload of so many rows stands for, times `weight`: FP32 [N, R], new, or added to `onto`."""
    if payload.shape != (nbytes(rows, row),) or payload.dtype != torch.uint8:
        raise ValueError(f"the payload of {rows} rows of {row} must be {nbytes(rows, row)} bytes, got {payload.dtype} "
                         f"{list(payload.shape)}")
    if onto_NR is not None and (onto_NR.shape != (rows, row) or onto_NR.dtype != torch.float32):
        raise ValueError(f"{rows} rows of {row} must be added to float32 [{rows}, {row}], got {onto_NR.dtype} "
                         f"{list(onto_NR.shape)}")
    if runs_native(payload, *([] if onto_NR is None else [onto_NR])):
        out_NR = payload.new_empty(rows, row, dtype=torch.float32) if onto_NR is None else onto_NR
        native.decode_two_bits(payload.data_ptr(), rows, row, weight, onto_NR is not None, out_NR.data_ptr(), threads())
        return out_NR
    level_N4 = payload[: 8 * rows].clone().view(torch.bfloat16).float().view(rows, 4) * weight  # at any address
    found_NR = level_N4.gather(1, unpack2(payload[8 * rows :])[: rows * row].view(rows, row).long())
    return found_NR if onto_NR is None else onto_NR.add_(found_NR)


def nbytes(rows: int, row: int) -> int:
    """Of a payload."""
    return 8 * rows + -(-rows * row // 4)


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
