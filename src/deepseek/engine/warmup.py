"""Experts in memory before the first request: those of some names, or the frequent ones of recorded use.

Recorded use is an ExpertUsage in `expert_use.json` beside the checkpoint; `record_use` adds to it.

Coverage: of the (token, expert) pairs that gates choose, the share whose expert is in memory. Expected for names: the
share of their own text's pairs, by the atlas (the scores of a measured name are such shares); for recorded use, and for
names whose shares were not measured: the share of the recorded pairs.

Shape letters: L MoE layers, E experts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from ..atlas import Atlas, ExpertUsage
from ..checkpoint import EXPERT_USE as USE
from ..errors import ConfigError, DataError
from ..files import write_atomically
from ..model import CausalLM
from ..model.adapters import bare
from ..quant.linear import QuantizedExperts
from .residency import Residency
from .routing_override import named

AUTO = "auto"


@dataclass(frozen=True)
class Warmup:
    """What was done. expected: share of pairs covered, 0..1; None where nothing was measured that could say.
    resident_LE: the experts that were in memory afterwards."""

    names: tuple[str, ...]
    experts: int
    of: int
    bytes: int
    seconds: float
    expected: float | None
    resident_LE: Tensor

    def measured(self, usage: ExpertUsage) -> float:
        """Coverage of what ran since: the share of its (token, expert) pairs whose expert was warm from the start."""
        return float(usage.counts_LE[self.resident_LE].sum() / max(int(usage.counts_LE.sum()), 1))

    def __str__(self) -> str:
        covered = "nothing says what coverage to expect" if self.expected is None else (
            f"{self.expected:.1%} expected coverage")
        return (f"warm-up: {', '.join(self.names)}: {self.experts:,} of {self.of:,} experts, "
                f"{self.bytes / 2**20:,.0f} MiB in {self.seconds:.1f} s, {covered}")


def warm_up(model: CausalLM, residency: Residency | None, names: Sequence[str], atlas: Atlas | None,
            folder: Path | None) -> Warmup:
    """Raises RequestError for an unknown name and ConfigError for `auto` without recorded use."""
    layers = model.config.moe_layers
    use = recorded_use(model, folder)
    if tuple(names) == (AUTO,):
        if use is None:
            raise ConfigError(f"warmup_experts = auto: there is no {USE} beside the model yet, or none that counts its "
                              "experts; a run with expert_memory leaves one (or give names)")
        order = [use.counts_LE[row].argsort(descending=True, stable=True).tolist() for row in range(len(layers))]
        order = [[e for e in row if use.counts_LE[i, e]] for i, row in enumerate(order)]
    else:
        groups = [named(name, atlas).by_layer() for name in names]
        order = [list(dict.fromkeys(e for turn in zip_longest(*(group.get(layer, []) for group in groups))
                                    for e in turn if e is not None)) for layer in layers]
    began = time.perf_counter()
    if residency is not None:
        residency.warm(order)
        there = [set(residency.loaded(row).nonzero().flatten().tolist()) for row in range(len(layers))]
        size = sum(residency.layers[row].spans[e].size for row, own in enumerate(there) for e in own)
    else:
        there, size = [set(row) for row in order], 0
        for layer, own in zip(layers, there, strict=True):
            experts = bare(model.moe_blocks()[layer].experts)
            for e in own:
                tensors = [experts.table[e]] if isinstance(experts, QuantizedExperts) else list(experts.dense(e))
                for tensor in tensors:  # a byte of every page makes the system map it
                    tensor.view(torch.uint8).flatten()[::4096].sum()
                    size += tensor.nbytes
    seconds = time.perf_counter() - began
    resident_LE = torch.zeros(len(layers), model.config.n_routed_experts, dtype=torch.bool)
    for row, own in enumerate(there):
        resident_LE[row, sorted(own)] = True
    done = Warmup(tuple(names), int(resident_LE.sum()), resident_LE.numel(), size, seconds,
                  _by_names(there, names, atlas, layers), resident_LE)
    return replace(done, expected=done.measured(use)) if done.expected is None and use is not None else done


def _by_names(there: list[set[int]], names: Sequence[str], atlas: Atlas | None, layers: Sequence[int]) -> float | None:
    """Coverage to expect of the names' own text, None where its shares were not measured."""
    row_of, shares = {layer: row for row, layer in enumerate(layers)}, []
    for name in names:
        group = atlas.group(name) if atlas is not None and name != AUTO else None
        if group is None or not group.scores or group.measured is None or group.measured.score != "token":
            return None
        kept: float = sum(score for expert, score in zip(group.experts, group.scores, strict=True)
                          if expert.index in there[row_of[expert.layer]])
        shares.append(kept / len(layers))
    return sum(shares) / len(shares)


def recorded_use(model: CausalLM, folder: Path | None) -> ExpertUsage | None:
    """None where there is none, or one that is damaged or of another model."""
    use = None if folder is None else _read(folder / USE)
    fits = use is not None and (use.layers, use.experts) == (model.config.moe_layers, model.config.n_routed_experts)
    return use if fits else None


def _read(file: Path) -> ExpertUsage | None:
    """A corrupt usage file is ignored and rewritten by the next run."""
    try:
        return ExpertUsage.from_json(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (OSError, UnicodeDecodeError, DataError):
        return None


def record_use(usage: ExpertUsage, folder: Path) -> None:
    """Add a run's counts to the recorded ones, of which half each time, so that old habits fade. A run that
    computed nothing changes nothing."""
    if not usage.tokens:
        return
    total, old = ExpertUsage.from_json(usage.to_json()), _read(folder / USE)
    if old is not None and (old.layers, old.experts) == (usage.layers, usage.experts):
        total.add_aged(old)
    write_atomically(folder / USE, total.to_json())
