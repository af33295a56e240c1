"""What a request may ask of the gates. Off by default; all but replaying its own routing changes the result.

    mask     named experts are not chosen
    bias     a number is added to the choice (never to the weight) of named experts
    top_k    another number of experts a token
    approx   experts that are not in memory are left out where enough others of the kept groups are
    replay   the experts that an earlier run of the same tokens visited, whatever the gate says now

The choice is made anew from the gate's affinities, by the gate's own rule (model/gate.py), for the request's tokens
alone; others in the batch keep theirs, to the bit.

Shape letters: T tokens, L MoE layers, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..atlas import Atlas
from ..errors import RequestError
from ..ids import ExpertSet
from ..model import CausalLM, Route
from ..model.cache import Control
from ..model.gate import routing_rule
from ..ops.gate import top_k as choose
from ..ops.gate import within_best_groups
from ..settings import is_number

NEVER = -1e4  # added to a choice: after all others, and still in order


@dataclass(frozen=True)
class ExpertControl:
    """mask: names of groups. bias: name -> number. top_k: 1 to the number of experts. approx: prefer what is loaded.
    replay: int64 [T, L, K], the experts of the first T tokens, as `RequestOutput.routed` gives them."""

    mask: Sequence[str] = ()
    bias: Mapping[str, float] = field(default_factory=dict)
    top_k: int | None = None
    approx: bool = False
    replay: Tensor | None = None


class RoutingOverride:
    """One request's controls, ready for the gates of a model. Raises RequestError for what the model cannot do."""

    def __init__(self, control: ExpertControl, model: CausalLM, atlas: Atlas | None,
                 loaded: Callable[[int], Tensor] | None) -> None:
        config = model.config
        self.control, self.config, self.loaded = control, config, loaded
        self.rows = {layer: row for row, layer in enumerate(config.moe_layers)}
        self.gates = {layer: block.gate for layer, block in model.moe_blocks().items()}
        if (top := control.top_k) is not None and not (isinstance(top, int) and 1 <= top <= config.n_routed_experts):
            raise RequestError(f"experts.top_k = {top!r}: must lie in 1..{config.n_routed_experts}")
        if (replay := control.replay) is not None:
            shape = [len(self.rows), config.num_experts_per_tok]
            if replay.dtype != torch.int64 or replay.ndim != 3 or [*replay.shape[1:]] != shape:
                raise RequestError(f"experts.replay is {replay.dtype} {list(replay.shape)}: must be int64 "
                                   f"[tokens, {shape[0]}, {shape[1]}]")
            if (replay < -1).any() or (replay >= config.n_routed_experts).any():
                raise RequestError(f"experts.replay: must hold 0..{config.n_routed_experts - 1}, or -1 for none")
            if control.mask or control.bias or control.top_k is not None or control.approx:
                raise RequestError("experts.replay: decides alone: mask, bias, top_k, approx must not stand beside it")
        self.delta: dict[int, Tensor] = {}
        for name in control.mask:
            self._add(name, -torch.inf, atlas)
        for name, value in control.bias.items():
            if not is_number(value):
                raise RequestError(f"experts.bias[{name!r}] = {value!r}: must be a finite number")
            self._add(name, value, atlas)
        for layer, delta_E in self.delta.items():
            if not bool(delta_E.isfinite().any()):
                raise RequestError(f"experts.mask = {list(control.mask)}: leaves no expert of layer {layer}")

    def _add(self, name: str, value: float, atlas: Atlas | None) -> None:
        for expert in named(name, atlas):
            delta = self.delta.setdefault(expert.layer, torch.zeros(
                self.config.n_routed_experts, device=self.gates[expert.layer].weight.device))
            delta[expert.index] += value

    def decide(self, layer: int, route: Route, first: int) -> Route:
        """route: the gate's, of tokens at positions first, first + 1, …. Where fewer experts are left than a token is
        to have, the index is -1 and the weight 0."""
        control = self.control
        if control.replay is not None:
            kept = control.replay.to(route.index_TK.device)[first : first + len(route.index_TK), self.rows[layer]]
            index_TK = route.index_TK.clone()
            index_TK[: len(kept)] = kept
            return self._weigh(route, index_TK)
        groups, kept_groups, top, best, *_ = routing_rule(self.config)
        choice_TE, bias_E = route.scores_TE, self.gates[layer].bias
        for delta_E in (bias_E, self.delta.get(layer)):
            choice_TE = choice_TE if delta_E is None else choice_TE + delta_E
        top = top if control.top_k is None else control.top_k
        if best and top <= self.config.n_routed_experts // groups * kept_groups:
            allowed_TE = within_best_groups(choice_TE.clamp(min=NEVER), groups, kept_groups, best).isfinite()
            choice_TE = choice_TE.masked_fill(~allowed_TE, -torch.inf)
        if control.approx and self.loaded is not None:
            choice_TE = torch.where(self.loaded(self.rows[layer]), choice_TE, choice_TE + NEVER)
        index_TK = choose(choice_TE, top)
        return self._weigh(route, index_TK.masked_fill(choice_TE.gather(1, index_TK) == -torch.inf, -1))

    def _weigh(self, route: Route, index_TK: Tensor) -> Route:
        """Weights by the gate's rule; a token that keeps its experts keeps its weights, to the bit."""
        *_, normalise, scale_anyway, scale = routing_rule(self.config)
        weight_TK = route.scores_TE.gather(1, index_TK.clamp(min=0)).masked_fill(index_TK < 0, 0.0)
        if normalise:
            weight_TK = weight_TK / (weight_TK.sum(1, keepdim=True) + 1e-20)
        if not normalise or scale_anyway:
            weight_TK = weight_TK * scale
        if index_TK.shape == route.index_TK.shape:
            same_T1 = (index_TK == route.index_TK).all(1, keepdim=True)
            weight_TK = torch.where(same_T1, route.weight_TK, weight_TK)
        return Route(index_TK, weight_TK, route.scores_TE)


def combine_overrides(parts: Sequence[tuple[int, int, RoutingOverride | None]]) -> Control:
    """For a pack: (tokens, position of the first, controls) of each of its chunks, in their order."""

    def control(layer: int, route: Route) -> Route:
        routes, start = [], 0
        for tokens, first, controls in parts:
            own = Route(*(part[start : start + tokens] for part in route))
            routes.append(own if controls is None else controls.decide(layer, own, first))
            start += tokens
        top = max(own.index_TK.shape[1] for own in routes)
        return Route(torch.cat([pad(own.index_TK, (0, top - own.index_TK.shape[1]), value=-1) for own in routes]),
                     torch.cat([pad(own.weight_TK, (0, top - own.weight_TK.shape[1])) for own in routes]),
                     route.scores_TE)

    return control


def named(name: str, atlas: Atlas | None) -> ExpertSet:
    """Raises RequestError for a name that there is not, listing those there are."""
    if atlas is None:
        raise RequestError(f"experts named {name!r} are asked for, and there is no atlas beside the model (`deepseek "
                           "atlas profile` makes one)")
    return atlas[name]
