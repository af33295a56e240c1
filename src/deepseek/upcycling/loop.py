"""Deepopt's training loop for new experts beside a frozen base."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..atlas import RoutingAccuracy
from ..data.shards import Batch
from ..deepopt.evaluation import held_out_loss
from ..deepopt.loop import TrainingLoop
from ..deepopt.settings import TrainConfig
from ..errors import CheckpointError, ConfigError
from ..files import read_json, write_json
from ..model import CausalLM
from ..tokenizer import Tokenizer
from ..tune.loop import PartialTrainer
from .settings import GrowConfig
from .streams import NamedText


class GrowTrainer(PartialTrainer):
    """Trains the experts and gate rows of a grown model; checkpoints hold these alone."""

    def __init__(self, model: CausalLM, text: NamedText, config: GrowConfig, out: Path, tokenizer: Tokenizer, *,
                 base: str) -> None:
        """base: the fingerprint of the model that the experts are grown in."""
        self.text, self.grow = text, config
        self.last: dict[str, Any] = {}  # the last evaluation
        super().__init__(model, text, train_config(config), out, tokenizer, settings={
            "grow": _settings(config), "base": {"fingerprint": base}}, extend=False)
        slow_gates(self, config.gate_lr)

    def before(self) -> dict[str, Any]:
        """The evaluation before the first step, made once. Raises ConfigError where it was of other records than those
        after will be."""
        path, rows = self.out / "before.json", self.grow.eval_rows
        if not path.is_file():
            write_json(path, self.evaluate() | {"eval_rows": rows})
        found = read_json(path, CheckpointError)
        if (known := found.get("eval_rows", rows)) != rows:
            raise ConfigError(f"eval_rows = {rows}: {path} is of {known}: give that number, or remove the run")
        return found

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Loss of every name's held-out records, and routing accuracy."""
        self.model.eval()
        self.accuracy = RoutingAccuracy(self.model.config, self.text.experts, whole_rows=True)
        losses = dict[str, float]()
        batches = max(1, -(-self.grow.eval_rows // self.config.batch_size))
        for place, name in enumerate(self.text.experts):
            found = held_out_loss(self.model, _Of(self.text, place), self.config, self.accuracy, batches,
                                  desc=f"evaluate {name}")
            assert found.mean is not None
            losses[name] = found.mean
        self.last = {"step": self.step, "eval_loss": sum(losses.values()) / len(losses), "loss_of": losses,
                     **self.accuracy.record()}
        return self.last


class _Of:
    """The held-out records of one name."""

    def __init__(self, text: NamedText, place: int) -> None:
        self.text, self.place = text, place

    def valid_batches(self, batch_size: int, seq_len: int, limit: int | None = None) -> Iterator[Batch]:
        return self.text.valid_of(self.place, batch_size, limit)


def slow_gates(loop: TrainingLoop, share: float) -> None:
    """Train the gates at a share of the learning rate."""
    gates = {id(block.gate.weight) for block in loop.model.moe_blocks().values()}
    for group in [*loop.optimizer.param_groups]:
        rows = [p for p in group["params"] if id(p) in gates]
        if rows:
            group["params"] = [p for p in group["params"] if id(p) not in gates]
            loop.optimizer.param_groups.append({**group, "params": rows, "lr_scale": share})


def train_config(config: GrowConfig) -> TrainConfig:
    return TrainConfig(
        steps=config.steps, batch_size=config.rows, seq_len=config.seq_len, lr=config.lr, min_lr_ratio=0.02,
        warmup_steps=round(config.warmup * config.steps), weight_decay=0.0, precision=config.precision, mtp_weight=0.0,
        balance_weight=0.0, bias_speed=0.0, guide_weight=config.guide_weight, eval_every=config.eval_every,
        eval_batches=1, save_every=config.save_every, seed=config.seed)


def _settings(config: GrowConfig) -> dict[str, Any]:
    """What decides the result beside TrainConfig."""
    names = ("first_layer", "group_experts", "group_width", "gate_lr", "gate_tokens", "valid_fraction")
    return {name: getattr(config, name) for name in names}
