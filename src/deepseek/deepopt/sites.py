"""Sites: ranks in rounds, each with text of some names, which train the experts of these names alone and all that is no
routed expert (SPES, arXiv 2602.11543; here by names, so that the text of a domain stays where it is).

    frozen   at a site: the routing groups of names of which it has no text. No moments, no steps, nothing sent
    merged   an expert as its owners have it, without outer momentum: the mean by tokens where a name has several.
             Everything else, groups without a name too, as in any round (rounds.py)

Where no rank of a round has a name, its experts stay as they are.

Shape letters: E experts; A, B the sides of an expert's matrix.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import ops
from ..errors import ConfigError
from ..model import CausalLM
from ..model.experts import RoutedExperts
from ..model.gate import Route


class Whole(torch.autograd.Function):
    """All experts' matrices, whose gradient goes to those of the parts that are trained."""

    @staticmethod
    def forward(ctx: Any, whole_EAB: Tensor, *parts: Tensor) -> Tensor:
        return whole_EAB.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_EAB: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        return None, *(part.clone() if want else None
                       for part, want in zip(gradient_EAB.chunk(len(wanted)), wanted, strict=True))


class SiteExperts(RoutedExperts):
    """The routed experts of a layer, of which some groups are trained. parts: GROUP.MATRIX -> its rows, a parameter in
    the memory of the whole, which alone is in the state of the model."""

    def __init__(self, whole: RoutedExperts, groups: Sequence[str], own: Collection[str]) -> None:
        nn.Module.__init__(self)
        self.gate_up_proj, self.down_proj = (
            nn.Parameter(matrix.detach(), requires_grad=False) for matrix in (whole.gate_up_proj, whole.down_proj))
        self.parts = {f"{group}.{name}": nn.Parameter(rows, requires_grad=group in own)
                      for name, matrix in self.named_parameters()
                      for group, rows in zip(groups, matrix.detach().chunk(len(groups)), strict=True)}

    def forward(self, x_TH: Tensor, route: Route) -> Tensor:
        return ops.expert_mlp(x_TH, route.index_TK, route.weight_TK, *(
            Whole.apply(matrix, *(part for key, part in self.parts.items() if key.endswith(f".{name}")))
            for name, matrix in self.named_parameters()))


def divide(model: CausalLM, names: Sequence[str], own: Collection[str]) -> None:
    """Leave to be trained, of the routing groups that bear names, those of `own`."""
    unnamed = [str(group) for group in range(len(names), model.config.n_group)]
    for block in model.moe_blocks().values():
        block.experts = SiteExperts(block.experts, [*names, *unnamed], {*own, *unnamed})


def check_owners(names: Sequence[str], own: Mapping[int, Sequence[str]], *, begun: bool) -> None:
    """Raises ConfigError where no rank has text of a name, or warns where the run has begun already. own: the names of
    each."""
    for name in names:
        if not any(name in one for one in own.values()):
            here = "; ".join(f"rank {rank}: {', '.join(one) or 'none'}" for rank, one in own.items())
            said = f"experts = {name}: no rank has text of it, so its experts are not trained ({here})"
            if not begun:
                raise ConfigError(f"{said}; start the site that has it, or leave the name out everywhere")
            warnings.warn(f"{said}; they stay as they are until the site that has it comes back", stacklevel=2)


def parts_on(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(name, group, parameter) of all groups' parts; those of a group without a name are called by its number."""
    for prefix, module in model.named_modules():
        if isinstance(module, SiteExperts):
            for key, part in module.parts.items():
                yield f"{prefix}.{key}", key.partition(".")[0], part
