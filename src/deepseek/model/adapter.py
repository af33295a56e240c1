"""What tuning puts into a model: experts with parameters of their own, and low-rank adapters (LoRA).

    TunedExperts   some experts of a layer as parameters of their own, the others frozen:   two calls of `expert_mlp`,
                   each over the pairs of its experts. A frozen expert is no parameter, so no optimizer can move it by
                   decay or momentum, and neither gradients nor moments of it exist.
    LoRALinear     W x + s B A x                                                   (arXiv 2106.09685; s = alpha / r)
    LoRAExperts    the same on gate, up and down of some experts of a layer. The adapter sits inside the experts'
                   nonlinearity, so their pairs are computed here, expert by expert, for experts that got a token;
                   all other pairs stay in the one call.

The modules stand in the places of those they hold as `base` and know nothing of how the base stores its weights: plain
or quantized, it answers a call, and `dense(expert)` where a matrix is needed.

`attach` puts an adapter into a model, by peft's names (arXiv 2106.09685 and peft's LoraConfig); `fold` of each module
gives the merged base back.

Shape letters: T tokens, H hidden, I intermediate, K experts a token, E experts, C experts with LoRA, R its rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, cast

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import ConfigError
from ..settings import COUNT, POSITIVE, SHARE, Option, Settings
from .experts import RoutedExperts
from .gate import Route

# what users of other models call a projection -> MLA's own, in order of preference
TARGET_ALIASES = {"q_proj": ("q_proj", "q_b_proj"), "k_proj": ("kv_b_proj",), "v_proj": ("kv_b_proj",),
            "qkv_proj": ("q_proj", "q_b_proj", "kv_b_proj"), "kv_proj": ("kv_b_proj",)}


@dataclass(frozen=True)
class LoraSpec(Settings):
    """What a LoRA adapter covers. targets: names of linear modules, as peft takes them. experts: {layer: [index]}.
    use_rslora: the scale is alpha / sqrt(r) (arXiv 2312.03732).

    Raises ConfigError naming field, rule and value.
    """

    r: Annotated[int, Option("rank", COUNT)]
    lora_alpha: Annotated[float, Option("the scale is lora_alpha / r", POSITIVE)]
    lora_dropout: Annotated[float, Option("share of inputs that training drops", SHARE)] = 0.0
    targets: tuple[str, ...] = ()
    experts: Mapping[int, Sequence[int]] = field(default_factory=dict)
    use_rslora: bool = False

    @property
    def scale(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class _SomeExperts(nn.Module):
    """Holds `base`, all experts of a layer, and knows which of them are `chosen`."""

    base: Any
    place_E: Tensor

    def __init__(self, base: Any, chosen: Sequence[int], experts: int, device: torch.device) -> None:
        super().__init__()
        self.base, self.chosen = base, tuple(chosen)
        place_E = torch.full((experts,), -1, device=device)
        place_E[list(self.chosen)] = torch.arange(len(self.chosen), device=device)
        self.register_buffer("place_E", place_E, persistent=False)

    def split_route(self, route: Route) -> tuple[Route, Tensor]:
        """(the route of the others' pairs, places [T, K] among the chosen): -1 where a pair is not there."""
        place_TK = self.place_E[route.index_TK]
        return route._replace(index_TK=torch.where(place_TK < 0, route.index_TK, -1)), place_TK


class TunedExperts(_SomeExperts):
    """gate_up_proj [C, 2I, H] and down_proj [C, H, I] start as copies of the base's; `fold` writes them back."""

    def __init__(self, base: RoutedExperts, chosen: Sequence[int]) -> None:
        super().__init__(base, chosen, base.down_proj.shape[0], base.down_proj.device)
        rows = list(self.chosen)
        # FP32 whatever the base: a step of 1e-5 is below half precision's resolution
        self.gate_up_proj = nn.Parameter(base.gate_up_proj.detach()[rows].float())
        self.down_proj = nn.Parameter(base.down_proj.detach()[rows].float())
        base.requires_grad_(False)

    def forward(self, x_TH: Tensor, route: Route) -> Tensor:
        others, place_TK = self.split_route(route)
        return self.base(x_TH, others) + ops.expert_mlp(
            x_TH, place_TK, route.weight_TK, self.gate_up_proj, self.down_proj)

    @torch.no_grad()
    def fold(self) -> RoutedExperts:
        """The base, with the tuned experts in their places."""
        rows = list(self.chosen)
        self.base.gate_up_proj[rows] = self.gate_up_proj.to(self.base.gate_up_proj.dtype)
        self.base.down_proj[rows] = self.down_proj.to(self.base.down_proj.dtype)
        return self.base


class LoRALinear(nn.Module):
    """base(x) + scale * B A dropout(x); lora_A [R, in], lora_B [out, R], zero at the start."""

    base: Any

    def __init__(self, base: Any, r: int, scale: float, dropout: float, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        base.requires_grad_(False)
        device = next(iter((*base.parameters(), *base.buffers()))).device
        self.base, self.scale, self.dropout = base, scale, nn.Dropout(dropout)
        self.out_features, self.in_features = base.out_features, base.in_features
        self.lora_A = nn.Parameter(_low_rank(r, base.in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        side = ops.linear(ops.linear(self.dropout(x), self.lora_A), self.lora_B)
        return self.base(x) + self.scale * side.to(x.dtype)

    @property
    def weight(self) -> Tensor:
        """W + scale * B A in float32 (a base in half precision would round most of B A away), for products that need
        the matrix itself."""
        return self.base.weight.float() + self.delta()

    def delta(self) -> Tensor:
        """scale * B A, [out, in], in the adapter's dtype."""
        return self.scale * self.lora_B @ self.lora_A

    def folds_into(self) -> list[Tensor]:
        """The base's weights that `fold` changes."""
        return [self.base.weight.detach()]

    @torch.no_grad()
    def fold(self) -> nn.Module:
        """The base with B A added to its matrix, in float32 and rounded once."""
        self.base.weight.copy_(self.base.weight.float() + self.delta())
        return self.base


class LoRAExperts(_SomeExperts):
    """LoRA on gate, up and down of the chosen experts. Names and shapes of the six parameters: `SHAPES`.

    base: RoutedExperts, or a quantized module with the same call and `dense(expert)`.
    """

    def __init__(self, base: Any, chosen: Sequence[int], experts: int, hidden: int, inner: int, r: int, scale: float,
                 dropout: float, device: torch.device, dtype: torch.dtype | None = None) -> None:
        super().__init__(base, chosen, experts, device)
        base.requires_grad_(False)
        self.scale, self.dropout = scale, nn.Dropout(dropout)
        for part, (out, wide) in {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}.items():
            first = [_low_rank(r, wide, device=device, dtype=dtype) for _ in self.chosen]
            self.register_parameter(f"{part}_A", nn.Parameter(torch.stack(first)))
            zeros = torch.zeros(len(self.chosen), out, r, device=device, dtype=dtype)
            self.register_parameter(f"{part}_B", nn.Parameter(zeros))

    def forward(self, x_TH: Tensor, route: Route) -> Tensor:
        others, place_TK = self.split_route(route)
        out_TH = self.base(x_TH, others)
        if self.training:  # a batch that visits none of them still gives every parameter a gradient, of zero
            out_TH = out_TH + 0 * torch.stack([p.sum() for p in self.parameters(recurse=False)]).sum().to(out_TH.dtype)
        for place in torch.unique(place_TK[place_TK >= 0]).tolist():
            token_P, k_P = (place_TK == place).nonzero(as_tuple=True)
            y_PH = self.expert_output(place, x_TH[token_P]) * route.weight_TK[token_P, k_P].unsqueeze(1).to(x_TH.dtype)
            out_TH = out_TH.index_add(0, token_P, y_PH)
        return out_TH

    def expert_output(self, place: int, x_PH: Tensor) -> Tensor:
        gate_up, down = self.base.dense(self.chosen[place])
        gate, up = ops.linear(x_PH, gate_up).chunk(2, 1)
        h = ops.swiglu((gate + self._side("gate", place, x_PH)).contiguous(),
                       (up + self._side("up", place, x_PH)).contiguous())
        return ops.linear(h, down) + self._side("down", place, h)

    def _side(self, part: str, place: int, x: Tensor) -> Tensor:
        a, b = getattr(self, f"{part}_A")[place], getattr(self, f"{part}_B")[place]
        return (self.scale * ops.linear(ops.linear(self.dropout(x), a), b)).to(x.dtype)

    def delta(self, place: int) -> tuple[Tensor, Tensor]:
        """What merging adds to gate_up_proj [2I, H] and down_proj [H, I] of the expert at `place`."""
        gate, up, down = (self.scale * getattr(self, f"{p}_B")[place] @ getattr(self, f"{p}_A")[place]
                          for p in ("gate", "up", "down"))
        return torch.cat((gate, up)), down

    def folds_into(self) -> list[Tensor]:
        """The base's weights that `fold` changes: views of a plain base's."""
        return [weight.detach() for expert in self.chosen for weight in self.base.dense(expert)]

    @torch.no_grad()
    def fold(self) -> nn.Module:
        """The base with B A added to its experts' matrices."""
        for place, expert in enumerate(self.chosen):
            for weight, delta in zip(self.base.dense(expert), self.delta(place), strict=True):
                weight.copy_(weight.float() + delta)
        return self.base


UNMERGED = (TunedExperts, LoRALinear, LoRAExperts)


def _low_rank(r: int, wide: int, *, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    """A as peft starts it: uniform with Kaiming's bound for a = sqrt(5), which is 1 / sqrt(in)."""
    return torch.empty(r, wide, device=device, dtype=dtype).uniform_(-(wide**-0.5), wide**-0.5)


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> linear module, plain or quantized, of every layer but the MTP modules' (transformers has none)."""
    return {name: module for name, module in model.named_modules()
            if hasattr(module, "in_features") and hasattr(module, "out_features") and ".mtp." not in name
            and not name.endswith(".base")}


def resolve_targets(model: nn.Module, targets: Sequence[str]) -> dict[str, list[str]]:
    """Target -> the modules it names: those whose name is it or ends in `.` and it; `all-linear` is all but the head.
    A name that the model does not have may be an alias of MLA's projections (TARGET_ALIASES).

    Raises ConfigError for a target that matches nothing, listing what there is.
    """
    there = linears(model)

    def matching(name: str) -> list[str]:
        return [module for module in there if module == name or module.endswith(f".{name}")]

    found: dict[str, list[str]] = {}
    for target in targets:
        if target == "all-linear":
            found[target] = [name for name in there if name != "lm_head"]
            continue
        aliases = TARGET_ALIASES.get(target, ()) if "." not in target else ()
        names = matching(target) or [name for alias in aliases for name in matching(alias)]
        if not names:
            last = sorted({name.rpartition(".")[2] for name in there})
            raise ConfigError(f"target_modules = {target!r}: matches nothing; the model has {', '.join(last)}, and "
                              f"{', '.join(sorted(TARGET_ALIASES))} stand for MLA's projections")
        found[target] = names
    return found


def attach(model: nn.Module, spec: LoraSpec) -> list[str]:
    """Put a LoRA adapter into `model` in place, freeze everything else, and return the names of the adapted modules.

    Raises ConfigError for targets or experts that the model does not have, and where nothing would be adapted.
    """
    config = cast(Any, model).config
    if any(lora_modules(model)):
        raise ConfigError("the model has a LoRA adapter already: merge them, or load the base again")
    targets = dict.fromkeys(name for names in resolve_targets(model, spec.targets).values() for name in names)
    if not targets and not any(spec.experts.values()):
        raise ConfigError("target_modules and experts are both empty: there is nothing to adapt")
    for layer, chosen in spec.experts.items():
        if layer not in config.moe_layers or any(not 0 <= e < config.n_routed_experts for e in chosen):
            raise ConfigError(f"experts: layer {layer} has no such experts {list(chosen)}: layers with routed experts "
                              f"are {list(config.moe_layers)}, of {config.n_routed_experts} each")
    if "lm_head" in targets and config.tie_word_embeddings:
        raise ConfigError("target_modules = 'lm_head': the head is tied to the embeddings here, so an adapter could "
                          "not be merged into it alone")
    model.requires_grad_(False)
    device = cast(Any, model).device
    for name in targets:
        base = model.get_submodule(name)
        model.set_submodule(name, LoRALinear(base, spec.r, spec.scale, spec.lora_dropout, torch.float32))
    names = list(targets)
    for layer, chosen in spec.experts.items():
        if chosen:
            name = f"model.layers.{layer}.mlp.experts"
            model.set_submodule(name, LoRAExperts(
                model.get_submodule(name), chosen, config.n_routed_experts, config.hidden_size,
                config.moe_intermediate_size, spec.r, spec.scale, spec.lora_dropout, device, torch.float32))
            names.append(name)
    return names


def lora_modules(model: nn.Module) -> Iterator[tuple[str, LoRALinear | LoRAExperts]]:
    """(name, module) of every module with LoRA matrices."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear | LoRAExperts):
            yield name, module


def fold(model: nn.Module) -> None:
    """Merge all LoRA matrices and tuned experts into the plain modules below them, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, UNMERGED):
            model.set_submodule(name, module.fold())
