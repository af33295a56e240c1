"""Two checkpoints of one shape on the same text: how far has routing moved?

Per layer, over T tokens:

    saturation      mean over tokens of |E_1 ∩ E_2| / K, the experts that both choose (OLMoE, arXiv 2409.02060); by
                    chance K/E
    drift           of the experts' shares of routed slots, p and q: total variation TV = sum |p - q| / 2, and
                    Jensen-Shannon JS = (KL(p|m) + KL(q|m)) / 2, m = (p + q) / 2, in bits; both lie in 0..1

and for every named group its coverage of this text, before and after.

Shape letters: L layers, T tokens, K experts a token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from ..model import CausalLM
from ..tokenizer import Tokenizer
from .atlas import Atlas, Shape
from .evidence import members
from .sample import Sample, route
from .usage import ExpertUsage


@dataclass(frozen=True)
class Trace:
    """The routes of a text through one model; index_LTK int16."""

    shape: Shape
    usage: ExpertUsage
    index_LTK: Tensor


@dataclass(frozen=True)
class Comparison:
    """Figures per layer, FP64 [L], and coverage by name: (slots before, after, weight before, after)."""

    layers: tuple[int, ...]
    tokens: int
    chance: float
    saturation_L: Tensor
    total_variation_L: Tensor
    jensen_shannon_L: Tensor
    coverage: dict[str, tuple[float, float, float, float]]

    def table(self) -> str:
        """A line a layer, their mean, and a line a name."""
        lines = [f"{self.tokens:,} tokens through both; saturation by chance {self.chance:.1%}",
                 f"{'layer':>5}  {'saturation':>10}  {'TV':>6}  {'JS bits':>7}"]
        figures = torch.stack((self.saturation_L, self.total_variation_L, self.jensen_shannon_L), 1)
        rows = [*zip(map(str, self.layers), figures.tolist(), strict=True), ("mean", figures.mean(0).tolist())]
        lines += [f"{layer:>5}  {saturation:>10.1%}  {tv:>6.3f}  {js:>7.4f}" for layer, (saturation, tv, js) in rows]
        if self.coverage:
            width = max(map(len, self.coverage))
            lines += ["", f"{'coverage':{width}}  {'slots':>16}  {'weight':>16}"]
            lines += [f"{name:{width}}  {a:>6.1%} -> {b:>6.1%}  {c:>6.1%} -> {d:>6.1%}"
                      for name, (a, b, c, d) in self.coverage.items()]
        return "\n".join(lines)


def trace(model: CausalLM, sample: Sample, tokenizer: Tokenizer,
          progress: Callable[[int, int], None] | None = None) -> Trace:
    """Route a sample. progress: called with (tokens done, tokens in all)."""
    config = model.config
    if not config.moe_layers:
        raise ConfigError("the model has no routed experts to compare")
    usage, found = ExpertUsage(config), []
    for batch in route(model, sample.windows, tokenizer):
        counted_T = batch.counted_BT.flatten().to(model.device)
        usage.add(batch.routing, counted_T)
        found.append(torch.stack([batch.routing.routes[layer].index_TK[counted_T].to("cpu", torch.int16)
                                  for layer in config.moe_layers]))
        if progress is not None:
            progress(usage.tokens, sample.tokens)
    return Trace(Shape.of(config), usage, torch.cat(found, 1))


def compare(first: Trace, second: Trace, atlas: Atlas | None = None) -> Comparison:
    """Raises ConfigError for models of different shapes, or an atlas of another."""
    if first.shape != second.shape:
        raise ConfigError(f"the models differ in shape: {first.shape}; {second.shape}")
    if atlas is not None and atlas.shape != first.shape:
        raise ConfigError(f"the atlas was made for another shape: {atlas.shape}; the models have {first.shape}")
    shape = first.shape
    saturation_L = torch.stack([(a_TK.unsqueeze(2) == b_TK.unsqueeze(1)).any(2).double().mean()
                                for a_TK, b_TK in zip(first.index_LTK, second.index_LTK, strict=True)])
    p_LE, q_LE = (t.usage.counts_LE.double() / t.usage.counts_LE.sum(1, keepdim=True) for t in (first, second))
    coverage = {}
    for name in atlas or ():
        mask_LE = torch.from_numpy(members(atlas[name], shape.layers, shape.experts))  # type: ignore[index]
        slots, weight = ([float((amount_LE * mask_LE).sum(1).div(amount_LE.sum(1)).mean()) for amount_LE in amounts]
                         for amounts in ((p_LE, q_LE), (first.usage.weights_LE, second.usage.weights_LE)))
        coverage[name] = (*slots, *weight)
    return Comparison(shape.layers, first.usage.tokens, shape.top_k / shape.experts, saturation_L,
                      total_variation(p_LE, q_LE), jensen_shannon(p_LE, q_LE), coverage)  # type: ignore[arg-type]


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """Of distributions over the last dimension: 0 for equal ones, 1 for disjoint ones."""
    return (p - q).abs().sum(-1) / 2


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """In bits, of distributions over the last dimension: 0 for equal ones, 1 for disjoint ones."""
    def entropy(x: Tensor) -> Tensor:
        return -torch.special.xlogy(x, x).sum(-1) / torch.log(torch.tensor(2.0, dtype=x.dtype))

    return (entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2).clamp(min=0)
