"""ESFT's scores from the routing logs that its authors publish."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import torch
from torch import Tensor

from deepseek.errors import DataError, NotFoundError


def token_scores(index_TK: Tensor, experts: int) -> Tensor:
    """r of every expert, FP64 [E]."""
    return torch.bincount(index_TK.flatten(), minlength=experts).double() / max(index_TK.numel(), 1)


def gate_scores(index_TK: Tensor, weight_TK: Tensor, experts: int) -> Tensor:
    """g of every expert, FP64 [E]. weight_TK: without routed_scaling_factor."""
    summed = torch.bincount(index_TK.flatten(), weight_TK.flatten().double(), minlength=experts)
    return summed / max(len(index_TK), 1)


def read_routing_log(path: str | Path, top_k: int) -> tuple[Tensor, Tensor]:
    """One layer's routing log as ESFT's authors publish it: (index_TK int64, weight_TK FP64) over all its sequences.

    A line is a sequence of T tokens: T*K expert ids joined by tabs, two tabs, T*K weights joined by tabs; *.gz is read
    as it lies. Raises NotFoundError, or DataError naming file and line.
    """
    path = Path(path)
    indices: list[Tensor] = []
    weights: list[Tensor] = []
    try:
        with (gzip.open(path, "rt") if path.suffix == ".gz" else path.open(encoding="utf-8")) as file:
            for number, line in enumerate(file, 1):
                ids, parted, values = line.rstrip("\n").partition("\t\t")
                try:
                    index, weight = [int(i) for i in ids.split("\t")], [float(v) for v in values.split("\t")]
                except ValueError as error:
                    raise DataError(f"{path}:{number}: not a line of a routing log: {error}") from None
                if not parted or len(index) != len(weight) or len(index) % top_k or min(index) < 0:
                    raise DataError(f"{path}:{number}: {len(index)} expert ids and {len(weight)} weights: must be "
                                    f"equally many, {top_k} a token, and no id negative")
                indices.append(torch.tensor(index).view(-1, top_k))
                weights.append(torch.tensor(weight, dtype=torch.float64).view(-1, top_k))
    except FileNotFoundError:
        raise NotFoundError(f"{path}: no such file") from None
    except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if not indices:
        raise DataError(f"{path}: the routing log is empty")
    return torch.cat(indices), torch.cat(weights)
