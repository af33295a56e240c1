"""How a tensor goes over the wire: payloads of bytes, and the error that each of them leaves.

    none     float32
    bf16     the upper half of it
    int8     blocks of 256: a float32 scale, absmax / 127, and a signed byte a value
    2bit     rows: each value as one of four bins, with the bins' means, BF16, before all rows. The edges are
             the row's mean and 0.98 standard deviations to either side of it, which of all edges lose least of normally
             distributed values (Max, 1960); two bits of this kind as in MuLoCo (arXiv 2505.23725)
    sparse   chunks of 4,096: the 64 largest values, each as a 12-bit place and one of four bins, positive or negative
             and above or below the mean magnitude, with the bins' means (SparseLoCo, 2508.15706)

What two sides must know besides the payload is the shape alone. A row is a tensor's last dimension, or several rows
together where these are short. Vectors, norms above all, always go as float32.

Error feedback (arXiv 1901.09847): what a payload leaves out is added to what is sent next.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ConfigError

BLOCK = 256  # values that share a scale
ROW = 512  # values of short rows taken together, at most
EDGE = 0.98  # of a bin, in standard deviations
CHUNK, BEST = 4096, 64

Shape = Sequence[int]


class Codec(Protocol):
    """A tensor's wire form."""

    def encode(self, tensor: Tensor) -> Tensor:
        """A float32 tensor -> its payload, uint8."""

    def decode(self, payload: Tensor, shape: Shape) -> Tensor:
        """A payload -> float32."""

    def nbytes(self, shape: Shape) -> int:
        """Of a payload."""


class Plain:
    """Values as they are, in a dtype."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype

    def encode(self, tensor: Tensor) -> Tensor:
        return to_bytes(tensor.detach().flatten().to(self.dtype))

    def decode(self, payload: Tensor, shape: Shape) -> Tensor:
        return of_bytes(payload, self.dtype).float().view(*shape)

    def nbytes(self, shape: Shape) -> int:
        return self.dtype.itemsize * math.prod(shape)


class Int8:
    def encode(self, tensor: Tensor) -> Tensor:
        x_NB = padded(tensor.flatten(), BLOCK)
        scale_N1 = x_NB.abs().amax(1, keepdim=True) / 127
        q_NB = (x_NB / scale_N1.where(scale_N1 > 0, 1)).round().to(torch.int8)
        return torch.cat([to_bytes(scale_N1.flatten()), q_NB.flatten()[: tensor.numel()].view(torch.uint8)])

    def decode(self, payload: Tensor, shape: Shape) -> Tensor:
        count = math.prod(shape)
        scale_N, q = payload[: (begin := len(payload) - count)], payload[begin:].view(torch.int8)
        return (padded(q.float(), BLOCK) * of_bytes(scale_N, torch.float32)[:, None]).flatten()[:count].view(*shape)

    def nbytes(self, shape: Shape) -> int:
        count = math.prod(shape)
        return count + 4 * -(-count // BLOCK)


class TwoBit:
    def encode(self, tensor: Tensor) -> Tensor:
        if tensor.ndim < 2:
            return Plain().encode(tensor)
        x_NR = tensor.reshape(-1, row_of(tensor.shape))
        mean_N1, edge_N1 = x_NR.mean(1, keepdim=True), EDGE * x_NR.std(1, keepdim=True, correction=0)
        code_NR = (x_NR > mean_N1 - edge_N1).byte() + (x_NR > mean_N1).byte() + (x_NR > mean_N1 + edge_N1).byte()
        return torch.cat([to_bytes(bin_means(x_NR, code_NR)), pack2(padded(code_NR.flatten(), 4))])

    def decode(self, payload: Tensor, shape: Shape) -> Tensor:
        if len(shape) < 2:
            return Plain().decode(payload, shape)
        row, count = row_of(shape), math.prod(shape)
        rows = count // row
        level_N4 = of_bytes(payload[: 8 * rows], torch.bfloat16).float().view(rows, 4)
        code_NR = unpack2(payload[8 * rows :])[:count].view(rows, row)
        return level_N4.gather(1, code_NR.long()).view(*shape)

    def nbytes(self, shape: Shape) -> int:
        count = math.prod(shape)
        return 4 * count if len(shape) < 2 else 8 * (count // row_of(shape)) + -(-count // 4)


class Sparse:
    def encode(self, tensor: Tensor) -> Tensor:
        if tensor.ndim < 2:
            return Plain().encode(tensor)
        x_NC = padded(tensor.flatten(), CHUNK)
        size_NC = x_NC.abs()
        least_N1 = size_NC.topk(BEST, 1).values[:, -1:]
        above_NC, equal_NC = size_NC > least_N1, size_NC == least_N1
        missing_N1 = BEST - above_NC.sum(1, keepdim=True)
        chosen_NC = above_NC | equal_NC & (equal_NC.cumsum(1) <= missing_N1)  # of equal ones the first
        place_NK = chosen_NC.nonzero()[:, 1].view(-1, BEST)
        x_NK = x_NC.gather(1, place_NK)
        size_NK = x_NK.abs()
        code_NK = 2 * (x_NK > 0).byte() + (size_NK > size_NK.mean(1, keepdim=True)).byte()
        return torch.cat([to_bytes(bin_means(x_NK, code_NK)), pack12(place_NK.flatten()), pack2(code_NK.view(-1, 4))])

    def decode(self, payload: Tensor, shape: Shape) -> Tensor:
        if len(shape) < 2:
            return Plain().decode(payload, shape)
        count = math.prod(shape)
        chunks = -(-count // CHUNK)
        levels, places, codes = payload.split([8 * chunks, chunks * BEST * 3 // 2, chunks * BEST // 4])
        level_N4 = of_bytes(levels, torch.bfloat16).float().view(chunks, 4)
        x_NK = level_N4.gather(1, unpack2(codes).view(chunks, BEST).long())
        x_NC = torch.zeros(chunks, CHUNK, device=payload.device).scatter_(1, unpack12(places).view(chunks, BEST), x_NK)
        return x_NC.flatten()[:count].view(*shape)

    def nbytes(self, shape: Shape) -> int:
        count = math.prod(shape)
        return 4 * count if len(shape) < 2 else -(-count // CHUNK) * (8 + BEST * 3 // 2 + BEST // 4)


CODECS: Mapping[str, Codec] = {"none": Plain(), "bf16": Plain(torch.bfloat16), "int8": Int8(), "2bit": TwoBit(),
                               "sparse": Sparse()}


class ErrorFeedback:
    """A codec that makes up for what it has lost. decay: the share of it that counts in the next payload."""

    def __init__(self, codec: Codec, decay: float = 1.0) -> None:
        self.codec, self.decay = codec, decay
        self.error: dict[str, Tensor] = {}

    @torch.no_grad()
    def encode(self, name: str, tensor: Tensor) -> Tensor:
        """The payload of a tensor and of what earlier ones under this name have lost. Raises ConfigError where a value
        is not finite."""
        wanted = tensor.float()
        if name in self.error:
            wanted = wanted + self.decay * self.error[name]
        if not bool(torch.isfinite(wanted).all()):
            raise ConfigError(f"{name}: has values that are not finite, which cannot be sent; a lower lr may help")
        payload = self.codec.encode(wanted)
        self.error[name] = wanted - self.codec.decode(payload, wanted.shape)
        return payload

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.error)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.error = dict(state)


class OuterNesterov:
    """SGD with Nesterov momentum on what a round has changed: v <- m v + d; theta <- theta - lr (d + m v)."""

    def __init__(self, lr: float, momentum: float) -> None:
        self.lr, self.momentum = lr, momentum
        self.velocity: dict[str, Tensor] = {}

    @torch.no_grad()
    def step(self, theta: Mapping[str, Tensor], change: Mapping[str, Tensor]) -> None:
        """Move theta in place."""
        for name, d in change.items():
            if self.momentum:
                old = self.velocity.get(name)
                v = self.velocity[name] = d.clone() if old is None else self.momentum * old + d
                d = d + self.momentum * v
            theta[name].sub_(d, alpha=self.lr)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.velocity)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.velocity = dict(state)


# ---- bits -----------------------------------------------------------------------------------------------------------


def to_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8).flatten()


def of_bytes(payload: Tensor, dtype: torch.dtype) -> Tensor:
    return payload.clone().view(dtype)  # a part of a payload may lie at an odd address


def padded(x_M: Tensor, width: int) -> Tensor:
    """[M] -> [N, width], the end filled with zeros."""
    return torch.nn.functional.pad(x_M, (0, -len(x_M) % width)).view(-1, width)


def row_of(shape: Shape) -> int:
    """Values that share bins: the last dimension, or as many of them as go into ROW and into the tensor."""
    last, rows = shape[-1], math.prod(shape[:-1])
    return last * max((n for n in range(1, max(1, ROW // last) + 1) if rows % n == 0), default=1)


def bin_means(x_NR: Tensor, code_NR: Tensor) -> Tensor:
    """Mean of each row's values in each of four bins, [N, 4] in BF16; 0 for an empty one."""
    parts = [code_NR == code for code in range(4)]
    return torch.stack([(x_NR * part).sum(1) / part.sum(1).clamp(min=1) for part in parts], 1).bfloat16()


def pack2(code_N4: Tensor) -> Tensor:
    """Four codes a byte, the first in the lowest bits."""
    return code_N4[:, 0] | code_N4[:, 1] << 2 | code_N4[:, 2] << 4 | code_N4[:, 3] << 6


def unpack2(packed_N: Tensor) -> Tensor:
    return torch.stack([packed_N >> shift & 3 for shift in (0, 2, 4, 6)], 1).flatten()


def pack12(place_M: Tensor) -> Tensor:
    """Two numbers below 4,096 in three bytes; M is even."""
    a, b = place_M.view(-1, 2).unbind(1)
    return torch.stack([a & 255, a >> 8 | (b & 15) << 4, b >> 4], 1).to(torch.uint8).flatten()


def unpack12(packed_M: Tensor) -> Tensor:
    x, y, z = packed_M.view(-1, 3).long().unbind(1)
    return torch.stack([x | (y & 15) << 8, y >> 4 | z << 4], 1).flatten()
