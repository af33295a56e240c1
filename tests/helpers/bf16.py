"""The ways in which BF16 products are computed on this machine and build, as DEEPSEEK_BF16 names them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from deepseek.ops import native

UNITS = native.bf16_units()  # name of the native kernels' BF16 units, or none
WAYS = ["fp32", "torch", *(["units"] if UNITS else [])]


@contextmanager
def computed_by(way: str) -> Iterator[None]:
    before = native.bf16_way()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "TORCH_BF16", way == "torch" or (way == "units" and native.TORCH_BF16))
        native.use_bf16(way)
        try:
            yield
        finally:
            native.use_bf16(before)
