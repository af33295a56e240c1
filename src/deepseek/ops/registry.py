"""Declares operations to torch: a schema from the annotations, and the shapes of results.

An operation called from Python runs its function at once; under `torch.compile` it is one node of the graph,
`torch.ops.deepseek.NAME`, and torch's opcheck examines that declaration (tests/ops/test_declared.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

OPERATIONS: dict[str, Any] = {}  # name -> the declared torch operation


def register_op(
    shape_of: Callable[..., R], mutates: Sequence[str] = ()
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Declare a function of tensors. shape_of: same arguments, gives empty tensors of the result's shape and dtype.
    mutates: names of the arguments that are written to."""

    def declare(function: Callable[P, R]) -> Callable[P, R]:
        op = torch.library.custom_op(f"deepseek::{function.__name__}", function, mutates_args=mutates)
        op.register_fake(shape_of)
        OPERATIONS[function.__name__] = op

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return (op if torch.compiler.is_compiling() else function)(*args, **kwargs)

        return call

    return declare
