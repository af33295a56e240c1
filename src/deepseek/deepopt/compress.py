"""How a tensor goes over the wire: payloads of bytes, and the error that each of them leaves.

    none     float32
    bf16     the upper half of it
    int8     blocks of 256: a float32 scale, absmax / 127, and a signed byte a value
    2bit     rows: each value as one of four bins, with the bins' means, BF16, before all rows (ops/two_bits.py); two
             bits of this kind as in MuLoCo (arXiv 2505.23725)
    sparse   chunks of 4,096: the 64 largest values, each as a 12-bit place and one of four bins, with the bins' means
             (ops/sparse.py; SparseLoCo, 2508.15706)

What two sides must know besides the payload is the shape alone. A row is a tensor's last dimension, or several rows
together where these are short. Vectors, norms above all, always go as float32.

Error feedback (arXiv 1901.09847): what a payload leaves out is added to what is sent next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ConfigError
from ..ops import sparse, two_bits

BLOCK = 256  # values that share a scale
ROW = 512  # values of short rows taken together, at most

Shape = Sequence[int]


class Coding(Protocol):
    """A coding of ops/ for float32 tensors of a form of its own."""

    def encode(self, value: Tensor, less: Tensor | None, error: Tensor | None, decay: float, /
               ) -> tuple[Tensor, Tensor] | None:
        """As Codec.encode_rest."""

    def decode(self, payload: Tensor, shape: Shape, weight: float, onto: Tensor | None, /) -> Tensor:
        """As Codec.add."""

    def nbytes(self, shape: Shape, /) -> int:
        """Of a payload."""


class Codec:
    """A tensor's wire form."""

    def encode(self, tensor: Tensor) -> Tensor:
        """A finite float32 tensor -> its payload, uint8."""
        raise NotImplementedError

    def decode(self, payload: Tensor, shape: Shape) -> Tensor:
        """A payload -> float32."""
        raise NotImplementedError

    def nbytes(self, shape: Shape) -> int:
        """Of a payload."""
        raise NotImplementedError

    def encode_rest(self, tensor: Tensor, less: Tensor | None = None, error: Tensor | None = None, decay: float = 1.0
                    ) -> tuple[Tensor, Tensor] | None:
        """The payload of tensor - less + decay * error, float32, and what it leaves out. None where a value is not
        finite."""
        wanted = two_bits.wanted_of(tensor, less, error, decay)
        if wanted is None:
            return None
        payload = self.encode(wanted)
        return payload, wanted - self.decode(payload, wanted.shape)

    def add(self, payload: Tensor, shape: Shape, weight: float, onto: Tensor | None = None) -> Tensor:
        """What the payload stands for, times `weight`: float32, new, or added to `onto`."""
        found = self.decode(payload, shape).mul_(weight)
        return found if onto is None else onto.add_(found)


class Plain(Codec):
    """Values as they are, in a dtype."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype

    def encode(self, tensor: Tensor) -> Tensor:
        return to_bytes(tensor.detach().flatten().to(self.dtype))

    def decode(self, payload: Tensor, shape: Shape) -> Tensor:
        return of_bytes(payload, self.dtype).float().view(*shape)

    def nbytes(self, shape: Shape) -> int:
        return self.dtype.itemsize * math.prod(shape)


PLAIN = Plain()


class Int8(Codec):
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


class Coded(Codec):
    """A coding of ops/ for matrices; vectors as they are."""

    def __init__(self, coding: Coding, form: Callable[[Shape], Shape]) -> None:
        """form: the shape that the coding takes a tensor in."""
        self.coding, self.form = coding, form

    def encode(self, tensor: Tensor) -> Tensor:
        coded = self.encode_rest(tensor)
        assert coded is not None
        return coded[0]

    def encode_rest(self, tensor: Tensor, less: Tensor | None = None, error: Tensor | None = None, decay: float = 1.0
                    ) -> tuple[Tensor, Tensor] | None:
        shape = tensor.shape
        if len(shape) < 2:
            return PLAIN.encode_rest(tensor, less, error, decay)
        form = self.form(shape)
        less, error = (None if x is None else x.reshape(form) for x in (less, error))
        coded = self.coding.encode(tensor.reshape(form), less, error, decay)
        return coded and (coded[0], coded[1].view(shape))

    def decode(self, payload: Tensor, shape: Shape) -> Tensor:
        return self.add(payload, shape, 1.0)

    def add(self, payload: Tensor, shape: Shape, weight: float, onto: Tensor | None = None) -> Tensor:
        if len(shape) < 2:
            return PLAIN.add(payload, shape, weight, onto)
        form = self.form(shape)
        return self.coding.decode(payload, form, weight, None if onto is None else onto.view(*form)).view(*shape)

    def nbytes(self, shape: Shape) -> int:
        return PLAIN.nbytes(shape) if len(shape) < 2 else self.coding.nbytes(self.form(shape))


def row_of(shape: Shape) -> int:
    """Values that share bins: the last dimension, or as many of them as go into ROW and into the tensor."""
    last, rows = shape[-1], math.prod(shape[:-1])
    return last * max((n for n in range(1, max(1, ROW // last) + 1) if rows % n == 0), default=1)


def as_rows(shape: Shape) -> Shape:
    return math.prod(shape) // row_of(shape), row_of(shape)


CODECS: Mapping[str, Codec] = {
    "none": PLAIN, "bf16": Plain(torch.bfloat16), "int8": Int8(), "2bit": Coded(two_bits, as_rows),
    "sparse": Coded(sparse, lambda shape: (math.prod(shape),))}


class ErrorFeedback:
    """A codec that makes up for what it has lost. decay: the share of it that counts in the next payload."""

    def __init__(self, codec: Codec, decay: float = 1.0) -> None:
        self.codec, self.decay = codec, decay
        self.error: dict[str, Tensor] = {}

    @torch.no_grad()
    def encode(self, name: str, tensor: Tensor, less: Tensor | None = None) -> Tensor:
        """The payload of a tensor, minus `less`, and of what earlier ones under this name have lost. Raises ConfigError
        where a value is not finite."""
        coded = self.codec.encode_rest(tensor.float(), less, self.error.get(name), self.decay)
        if coded is None:
            raise ConfigError(f"{name}: has values that are not finite, which cannot be sent; a lower lr may help")
        payload, self.error[name] = coded
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
                v = self.velocity[name] = d.clone() if old is None else (self.momentum * old).add_(d)
                d = (self.momentum * v).add_(d)
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
