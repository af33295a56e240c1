"""Activations that wait for the backward pass in FP8: a byte and a scale a row in place of four or two bytes a number.

What a layer saves for its gradient is stored as float8_e4m3fn, each row (the last dimension) stretched to its largest
number, and comes back in its own dtype when the gradient asks for it: the forward pass has the same bits as without,
gradients are off by what 4 bits of a fraction leave (1/16 of a number at most). A tensor that several operations save
is stored once. Parameters, integers and narrow rows stay as they are.

DeepSeek-V3 keeps inputs of its linear layers and of SwiGLU like this (arXiv 2412.19437, section 3.3.3).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

LARGEST = 448.0  # of e4m3fn
PART = 1 << 18  # numbers converted at a time
NARROW = 16  # a row with fewer numbers gains nothing


class Packed:
    """A tensor in FP8. source: of its memory, whose address is no other's while this object is there."""

    def __init__(self, x: Tensor, source: StorageWeakRef) -> None:
        self.source, self.shape, self.dtype = source, x.shape, x.dtype
        rows = x.detach().reshape(-1, x.shape[-1])
        self.code = torch.empty(rows.shape, dtype=torch.float8_e4m3fn, device=x.device)
        self.scale = torch.empty(len(rows), 1, device=x.device)
        for part in self._parts():
            values = rows[part].float()
            scale = torch.linalg.vector_norm(values, torch.inf, -1, keepdim=True).clamp_(min=1e-30).div_(LARGEST)
            self.scale[part] = scale
            self.code[part] = values / scale

    def unpack(self) -> Tensor:
        rows = torch.empty(self.code.shape, dtype=self.dtype, device=self.code.device)
        for part in self._parts():
            rows[part] = self.code[part].float() * self.scale[part]
        return rows.view(self.shape)

    def _parts(self) -> Iterator[slice]:
        """Of the rows, some at a time: in FP32 a tensor would take more than what this saves."""
        rows, width = self.code.shape
        step = max(1, PART // width)
        return (slice(first, first + step) for first in range(0, rows, step))


class Saver:
    """Hooks for what is saved inside `with saver.saving(exact)`; shared by the layers of a model."""

    def __init__(self) -> None:
        self._packed: WeakValueDictionary[Any, Packed] = WeakValueDictionary()

    def saving(self, exact: Iterable[Tensor]) -> contextlib.AbstractContextManager[Any]:
        """exact: tensors that are not packed, nor what shares their memory."""
        kept = {t.untyped_storage().data_ptr() for t in exact}

        def pack(x: Tensor) -> Tensor | Packed:
            if (not x.is_floating_point() or x.ndim == 0 or x.shape[-1] < NARROW
                    or x.untyped_storage().data_ptr() in kept):
                return x
            source = StorageWeakRef(x.untyped_storage())
            key = source.cdata, x.storage_offset(), x.shape, x.stride(), x.dtype, x._version
            if (found := self._packed.get(key)) is None:
                found = self._packed[key] = Packed(x, source)
            return found

        return torch.autograd.graph.saved_tensors_hooks(
            pack, lambda found: found.unpack() if isinstance(found, Packed) else found)
