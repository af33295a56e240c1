"""Quantized modules that replace the model's own; the model's code stays as it is.

A `QuantTarget` is a module that can be quantized, found by its class in a model that may be on the meta device:

    matrix   Linear          packed: a matrix [rows, columns] (ops/panels.py)
    mlp      MLP             packed: gate and up [rows, columns], down [columns, rows]
    experts  RoutedExperts   packed: one such MLP for every expert, each a tensor of its own
    table    nn.Embedding    codes int8 [rows, columns], step float32 [rows]

The gate, norms and biases are none of these and stay as they are. The packed bytes are buffers, usually views of a
mapped file. They carry no gradient, so a quantized model is not trained itself; a gradient goes *through* it to what is
(LoRA): where the input wants one, a module computes from its weights made dense for that moment, in the forward pass
and again in the backward pass, without the rounding of activations that the kernels do.

Shape letters: T tokens, H hidden, K experts a token, O rows of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..config import ModelConfig
from ..errors import ConfigError, shown
from ..model import CausalLM, Route
from ..model.experts import MoE, RoutedExperts
from ..model.layers import MLP, Linear
from ..ops.panels import ROWS, Bits, matrix_bytes, unpack, unpack_mlp
from . import fp8, int4

METHOD, VERSION = "moe_dr", 1


@dataclass(frozen=True)
class QuantConfig:
    """How a checkpoint is quantized: `quantization_config` of its config.json. keep: patterns (fnmatch) of the names of
    weights that stay as they were. Raises ConfigError for a format that there is not."""

    format: str = "nf4"
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.format not in ("nf4", "int8"):
            raise ConfigError(f"format = {self.format!r}: must be nf4 or int8")

    @property
    def bits(self) -> Bits:
        return 4 if self.format == "nf4" else 8

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD, "format": self.format, "version": VERSION, "keep": list(self.keep)}

    @classmethod
    def of(cls, config: ModelConfig, origin: str) -> QuantConfig | None:
        """Read a checkpoint's quantization_config; None where the weights are plain, DeepSeek's FP8 or int4 (int4.py).

        Raises ConfigError naming `origin` for a method, version or format that is not read here.
        """
        keys = config.extra.get("quantization_config")
        if keys is None:
            return None
        if not isinstance(keys, Mapping):
            raise ConfigError(f"{origin}: quantization_config = {shown(keys)}: must be an object")
        method = keys.get("quant_method", "fp8")
        if method == "fp8":
            for key, only in (("weight_block_size", [fp8.BLOCK] * 2), ("fmt", "e4m3")):
                if keys.get(key, only) != only:
                    raise ConfigError(f"{origin}: quantization_config.{key} = {shown(keys[key])}: of FP8 only "
                                      f"DeepSeek's is read ({only})")
            return None
        if method == int4.METHOD:
            int4.check(keys, origin)
            return None
        if method != METHOD:
            raise ConfigError(f"{origin}: quantization_config.quant_method = {shown(method)}: must be {METHOD} or "
                              "DeepSeek's fp8, or compressed-tensors with int4; others are not read here")
        keep = keys.get("keep", ())
        if not isinstance(keep, list | tuple) or not all(isinstance(name, str) for name in keep):
            raise ConfigError(f"{origin}: quantization_config.keep = {shown(keep)}: must be a list of names")
        if (version := keys.get("version")) != VERSION or isinstance(version, bool):
            raise ConfigError(f"{origin}: quantization_config.version = {shown(version)}: this program reads {VERSION}")
        try:
            return cls(str(keys.get("format")), tuple(keep))
        except ConfigError as error:
            raise ConfigError(f"{origin}: quantization_config.{error}") from None


class QuantTarget(NamedTuple):
    """A module to quantize: its name in the model, and the shape described at the top of this file."""

    kind: Literal["matrix", "mlp", "experts", "table"]
    module: str
    rows: int
    columns: int


def quant_targets(model: CausalLM) -> Iterator[QuantTarget]:
    """Everything in the model that can be quantized, in the model's order."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        if isinstance(module, RoutedExperts):
            yield QuantTarget("experts", name, module.down_proj.shape[2], module.down_proj.shape[1])
        elif isinstance(module, MLP):
            inside = (f"{name}.",)
            yield QuantTarget("mlp", name, module.gate_proj.out_features, module.gate_proj.in_features)
        elif isinstance(module, Linear):
            yield QuantTarget("matrix", name, module.out_features, module.in_features)
        elif isinstance(module, nn.Embedding):
            yield QuantTarget("table", name, module.num_embeddings, module.embedding_dim)


def replace_module(model: CausalLM, target: QuantTarget, stored: Sequence[Tensor], bits: Bits) -> None:
    """Replace the module at `target` by one that computes from `stored`: (packed,), a packed MLP for every expert, or
    (codes, step). Shared experts join the routed ones where those are quantized: one call runs both."""
    old = model.get_submodule(target.module)
    new: nn.Module
    if target.kind == "matrix":
        new = QuantizedLinear(stored[0], target.rows, target.columns, old.bias, bits)  # type: ignore[arg-type]
    elif target.kind == "experts":
        new = QuantizedExperts(stored, target.columns, target.rows, bits)
    elif target.kind == "table":
        new = QuantizedEmbedding(stored[0], stored[1])
    else:
        above = model.get_submodule(target.module.rpartition(".")[0])
        if isinstance(above, MoE) and isinstance(above.experts, QuantizedExperts):
            above.experts.shared, above.experts.shared_inner = stored[0], target.rows
            del above.shared_experts
            return
        new = QuantizedMLP(stored[0], target.rows, bits)
    model.set_submodule(target.module, new)


def _checkpointed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Compute function(x) with a gradient to x alone; dense weights are made again in the backward pass, not kept."""
    return checkpoint(function, x, use_reentrant=False)


def _wants_gradient(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _dense_mlp(packed: Tensor, hidden: int, inner: int, bits: Bits) -> tuple[Tensor, Tensor]:
    """gate_up_proj [2I, H] and down_proj [H, I], float32."""
    gate, up, down = (part.dequantize() for part in unpack_mlp(packed, hidden, inner, bits))
    return torch.cat((gate, up)), down


def _mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = linear(x, gate_up).chunk(2, -1)
    return linear(silu(gate) * up, down)


def allow_adapters(model: nn.Module) -> None:
    """Allow `train()` on a quantized model whose adapters are trained."""
    for module in model.modules():
        if isinstance(module, _Quantized):
            module.adapted = True


def is_quantized(model: nn.Module) -> bool:
    return any(isinstance(module, _Quantized) for module in model.modules())


class _Quantized(nn.Module):
    adapted = False  # LoRA adapters are trained around it

    def train(self, mode: bool = True) -> _Quantized:
        if mode and not self.adapted:
            raise ConfigError("a quantized model has no gradients and cannot be trained: train LoRA adapters on it "
                              "(LoRAAdapter), or the checkpoint it was made from, or write a plain one "
                              "(`deepseek quantize IN OUT --format bf16`)")
        return super().train(False)

    def __init__(self) -> None:
        super().__init__()
        self.training = False


class QuantizedLinear(_Quantized):
    """x W^T + b; W is packed [rows, columns]."""

    packed: Tensor

    def __init__(self, packed: Tensor, rows: int, columns: int, bias: nn.Parameter | None, bits: Bits) -> None:
        super().__init__()
        self.register_buffer("packed", packed)
        self.bias = bias
        self.out_features, self.in_features, self.bits = rows, columns, bits
        self._dense: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """W in BF16, made when first asked for and kept: for products that need the matrix itself, such as
        absorbed attention. Not part of the state."""
        if self._dense is None:
            self._dense = self._unpacked().bfloat16()
        return self._dense

    def _unpacked(self) -> Tensor:
        return unpack(self.packed, self.out_features, self.in_features, self.bits).dequantize()

    def forward(self, x: Tensor) -> Tensor:
        if _wants_gradient(x):
            return _checkpointed(lambda x: linear(x, self._unpacked(), self.bias), x)
        return ops.quantized_linear(x, self.packed, self.out_features, self.bias, bits=self.bits)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        self._dense = None
        return super()._apply(fn, recurse)


class QuantizedMLP(_Quantized):
    """down(silu(gate(x)) * up(x)) from one packed range."""

    packed: Tensor

    def __init__(self, packed: Tensor, inner: int, bits: Bits) -> None:
        super().__init__()
        self.register_buffer("packed", packed)
        self.inner, self.bits = inner, bits

    def forward(self, x: Tensor) -> Tensor:
        if _wants_gradient(x):
            return _checkpointed(lambda x: _mlp(x, *_dense_mlp(self.packed, x.shape[-1], self.inner, self.bits)), x)
        return ops.quantized_mlp(x.flatten(0, -2), self.packed, self.inner, bits=self.bits).view(x.shape)


class QuantizedExperts(_Quantized):
    """The routed experts of a layer, each a packed MLP, and its shared experts once `replace_module` moves them here.

    The experts' tensors are in a table and no state: a layer has hundreds, mapped from a file.
    """

    shared: Tensor | None

    def __init__(self, packed: Sequence[Tensor], hidden: int, inner: int, bits: Bits) -> None:
        super().__init__()
        self.table = ops.ExpertTable(packed, hidden, inner, bits)
        self.register_buffer("shared", None)
        self.shared_inner = 0

    def dense(self, expert: int) -> tuple[Tensor, Tensor]:
        """gate_up_proj [2I, H] and down_proj [H, I] of one expert, made dense for the moment, float32."""
        return _dense_mlp(self.table[expert], self.table.hidden, self.table.inner, self.table.bits)

    def gate_up(self, expert: int, x_PH: Tensor) -> tuple[Tensor, Tensor]:
        """gate(x) and up(x) of one expert, [P, I], in the arithmetic of the kernels."""
        table, panels = self.table, -(-self.table.inner // ROWS)
        packed = table[expert][: 2 * matrix_bytes(table.inner, table.hidden, table.bits)]
        both = ops.quantized_linear(x_PH, packed, 2 * panels * ROWS, bits=table.bits).view(-1, panels, 2, ROWS)
        gate, up = (both[:, :, i].flatten(1)[:, : table.inner] for i in (0, 1))
        return gate, up

    def down(self, expert: int, h_PI: Tensor) -> Tensor:
        """down(h) of one expert, [P, H]."""
        table = self.table
        start = 2 * matrix_bytes(table.inner, table.hidden, table.bits)
        packed = table[expert][start : start + matrix_bytes(table.hidden, table.inner, table.bits)]
        return ops.quantized_linear(h_PI, packed, table.hidden, bits=table.bits)

    def forward(self, x_TH: Tensor, route: Route) -> Tensor:
        """Weighted sum over the experts; pairs with index -1 are skipped."""
        if _wants_gradient(x_TH):
            return self._differentiable(x_TH, route)
        elsewhere = route.index_TK < 0
        if bool(elsewhere.any()):  # computed in vain as expert 0, at weight zero
            route = route._replace(index_TK=route.index_TK.clamp(min=0),
                                   weight_TK=route.weight_TK.masked_fill(elsewhere, 0.0))
        return ops.quantized_experts(
            x_TH, route.index_TK, route.weight_TK, self.table, self.table.inner, shared=self.shared,
            shared_inner=self.shared_inner, bits=self.table.bits)

    def _differentiable(self, x_TH: Tensor, route: Route) -> Tensor:
        out_TH = torch.zeros_like(x_TH)
        for e in torch.unique(route.index_TK[route.index_TK >= 0]).tolist():
            token_P, k_P = (route.index_TK == e).nonzero(as_tuple=True)
            y_PH = _checkpointed(lambda x, e=e: _mlp(x, *self.dense(e)), x_TH[token_P])  # type: ignore[misc]
            out_TH = out_TH.index_add(0, token_P, y_PH * route.weight_TK[token_P, k_P].unsqueeze(1))
        if self.shared is not None:
            shared, table = self.shared, self.table
            out_TH = out_TH + _checkpointed(
                lambda x: _mlp(x, *_dense_mlp(shared, table.hidden, self.shared_inner, table.bits)), x_TH)
        return out_TH

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedExperts:
        table = self.table
        self.table = ops.ExpertTable([fn(packed) for packed in table], table.hidden, table.inner, table.bits)
        return super()._apply(fn, recurse)


class QuantizedEmbedding(_Quantized):
    """Rows of int8 with one step each; a lookup gives float32."""

    codes: Tensor
    step: Tensor

    def __init__(self, codes: Tensor, step: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("step", step)

    def forward(self, ids: Tensor) -> Tensor:
        return self.codes[ids].float() * self.step[ids].unsqueeze(-1)
