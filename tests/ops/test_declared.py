"""What torch is told about the operations: schemas, shapes without computing, what is written to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from deepseek import ops
from deepseek.ops.panels import Bits, matrix_bytes, pack
from deepseek.ops.registry import OPERATIONS
from tests.helpers.operations import (
    HIDDEN,
    INNER,
    SHARED,
    randn,
    random_attention,
    random_experts,
    random_low_rank,
    random_matrix,
    random_mlp,
    random_naive,
)

Call = tuple[tuple[Any, ...], dict[str, Any]]


def linear(bits: Bits, *shape: int, bias: bool = False) -> Call:
    packed = pack(random_matrix(20, shape[-1], bits))
    return (randn(*shape), packed, 20, randn(20) if bias else None), {"bits": bits}


def mlp(tokens: int, bits: Bits) -> Call:
    return (randn(tokens, HIDDEN), random_mlp(HIDDEN, INNER, bits), INNER), {"bits": bits}


def experts(tokens: int, bits: Bits, *, shared: bool) -> Call:
    case = random_experts(tokens, bits)
    args = case.x_TH, case.index_TK, case.weight_TK, list(case.experts), INNER
    return (*args, case.shared, SHARED) if shared else args, {"bits": bits}


def grouped(tokens: int, bits: Bits) -> Call:
    packed = torch.cat([pack(random_matrix(20, 70, bits, seed)) for seed in range(3)])
    return (randn(tokens, 3, 70), packed, 0, matrix_bytes(20, 70, bits), 20), {"bits": bits}


def plain(dtype: torch.dtype) -> Call:
    return (randn(5, 36), randn(50, 36).to(dtype)), {}


def low_rank(tokens: int, columns: int, rows: int) -> Call:
    return tuple(random_low_rank(tokens, columns, rows)), {}


def attention(heads: int, rank: int, tokens: int) -> Call:
    return (*random_attention(heads, rank, tokens), 0.2), {}


def naive(heads: int, tokens: int, bits: Bits) -> Call:
    return (*random_naive(heads, tokens, bits)[:-1], 0.2), {"bits": bits}


def gate(bias_E: torch.Tensor | None, *, sigmoid: bool) -> Call:
    return (randn(9, 32), bias_E, 8, 3, 5, 2, sigmoid, True, sigmoid, 2.5), {}


def latents(*, interleave: bool, together: bool) -> Call:
    rows = torch.zeros(2, 9, 36) if together else torch.zeros(9, 2, 36).transpose(0, 1)
    cos, sin = randn(1, 5, 4), randn(1, 5, 4, seed=1)
    return (randn(2, 5, 3, 20), randn(2, 5, 36), randn(28), 1e-6, cos, sin, interleave, rows, 3), {}


def apart(call: Call) -> Call:
    """The same with the first tensor's dimensions in another order in memory."""
    (x, *rest), options = call
    return (x.transpose(0, -1).contiguous().transpose(0, -1), *rest), options


CALLS: dict[str, list[Call]] = {
    "quantized_linear": [linear(4, 5, 130), linear(8, 2, 3, 64, bias=True), linear(4, 0, 64),
                         apart(linear(4, 2, 3, 64))],
    "quantized_mlp": [mlp(3, 4), mlp(9, 8), apart(mlp(3, 4))],
    "quantized_experts": [experts(3, 4, shared=True), experts(9, 8, shared=False), apart(experts(3, 4, shared=True))],
    "grouped_quantized_linear": [grouped(3, 4), grouped(9, 8), apart(grouped(3, 4))],
    "add_low_rank": [low_rank(5, 36, 50), low_rank(1, 8, 3), apart(low_rank(5, 36, 50))],
    "plain_linear": [plain(torch.float32), plain(torch.bfloat16), apart(plain(torch.float32))],
    "naive_attention": [naive(3, 2, 4), naive(1, 20, 8), apart(naive(3, 2, 4))],
    "choose_experts": [gate(None, sigmoid=False), gate(randn(32), sigmoid=True), apart(gate(None, sigmoid=True))],
    "latent_attention": [attention(3, 16, 2), attention(3, 12, 2), apart(attention(3, 16, 2))],
    "prepare_latents": [latents(interleave=True, together=True), latents(interleave=False, together=False)],
}


def test_every_operation_has_its_calls() -> None:
    assert set(CALLS) == set(OPERATIONS)


@pytest.mark.parametrize(("name", "call"), [(name, call) for name, calls in CALLS.items() for call in calls],
                         ids=[f"{name}-{i}" for name, calls in CALLS.items() for i in range(len(calls))])
def test_opcheck(name: str, call: Call) -> None:
    results = torch.library.opcheck(OPERATIONS[name], *call)
    assert results and set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", CALLS)
def test_one_node_under_compile_and_none_without(name: str) -> None:
    """Called from Python the function runs at once; in a compiled graph it is one node. The results are the same."""
    torch.compiler.reset()
    args, options = CALLS[name][0]
    function: Callable[..., torch.Tensor] = getattr(ops, name)
    nodes: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        nodes.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    compiled = torch.compile(lambda *given: function(*given, **options), fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(*args), function(*args, **options), rtol=0, atol=0)
    assert [node for node in nodes if node.startswith("deepseek.")] == [f"deepseek.{name}.default"]


def test_training_compiles() -> None:
    """In a traced graph tensors have no addresses: it holds torch's forms of these operations."""
    torch.compiler.reset()

    def loss(x_TH: torch.Tensor, w_HH: torch.Tensor, norm_H: torch.Tensor) -> torch.Tensor:
        h = ops.swiglu(ops.linear(ops.rms_norm(x_TH, norm_H, 1e-6), w_HH), x_TH)
        heads = h.view(1, -1, 4, 8).transpose(1, 2)
        return ops.causal_attention(heads, heads, heads, 0.3, None).square().mean()

    given = [t.requires_grad_() for t in (randn(20, 32), randn(32, 32, seed=1), randn(32, seed=2))]
    want = torch.autograd.grad(loss(*given), given)
    got = torch.autograd.grad(torch.compile(loss, backend="aot_eager")(*given), given)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
