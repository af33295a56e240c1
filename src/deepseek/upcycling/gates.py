"""Gate rows that tell domains apart, fitted to a base's hidden states.

The gate of a grown model looks at what the FFN looks at, and its scores are sigmoids without a constant inside. So a
row is a logistic regression without an intercept (the mean of the inputs, which hardly moves, serves as one): text of
the group's name against all other text, each with half of the weight. Fitted first, in seconds, by full Newton-like
steps over a sample, it spares training the search.

Shape letters: T sampled tokens, H hidden, G names.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from ..data.shards import Batch
from ..model import CausalLM
from ..progress import ProgressBar

ITERATIONS = 60
RIDGE = 1e-4  # of inputs scaled to a mean square of one


@torch.no_grad()
def sample_inputs(model: CausalLM, layers: Iterable[int], batches: Iterable[Batch], total: int) -> tuple[
        dict[int, Tensor], Tensor]:
    """What the FFNs of these layers are given for every labelled token: (layer -> [T, H] BF16, labels [T]). total: of
    the batches, for the bar."""
    kept: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    labels: list[Tensor] = []
    chosen_T = torch.zeros(0, dtype=torch.bool)

    def keep(layer: int) -> None:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            kept[layer].append(args[0].flatten(0, -2)[chosen_T].to(torch.bfloat16))

        block: Any = model.model.layers[layer]
        handles.append(block.mlp.register_forward_pre_hook(hook))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for layer in kept:
            keep(layer)
        for batch in ProgressBar(batches, total=total, desc="gates", unit="batch", leave=False):
            chosen_T = (batch.expert_BT >= 0).flatten()
            labels.append(batch.expert_BT.flatten()[chosen_T])
            model.hidden(batch.ids_BT, batch.real_BT)
    finally:
        for handle in handles:
            handle.remove()
    return {layer: torch.cat(parts) for layer, parts in kept.items()}, torch.cat(labels)


def fit_rows(x_TH: Tensor, label_T: Tensor, groups: int) -> Tensor:
    """[G, H]: of each group the row w that minimises the cross entropy of sigmoid(w x) with `label == group`."""
    x_TH = x_TH.float()
    scale_H = x_TH.square().mean(0).sqrt().clamp(min=1e-6)
    x_TH = x_TH / scale_H
    is_TG = (label_T.unsqueeze(1) == torch.arange(groups)).float()
    share_G = is_TG.mean(0).clamp(1e-6, 1 - 1e-6)
    weight_TG = is_TG * (0.5 / share_G) + (1 - is_TG) * (0.5 / (1 - share_G))
    row_GH = torch.zeros(groups, x_TH.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([row_GH], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = binary_cross_entropy_with_logits(x_TH @ row_GH.t(), is_TG, weight_TG) * groups
        value = value + RIDGE * row_GH.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return row_GH.detach() / scale_H
