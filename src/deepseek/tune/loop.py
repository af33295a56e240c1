"""Deepopt's training loop over records, evaluated on held-out records and on general text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..checkpoint import check_manifest, write_manifest
from ..deepopt.evaluation import HeldOut, held_out_loss
from ..deepopt.loop import TrainingLoop
from ..deepopt.optimizers import trained
from ..deepopt.settings import TrainConfig
from ..files import replace_folder, write_json
from ..quant.linear import is_quantized
from .records import RecordSet
from .tuned_model import TunedModel


class PartialTrainer(TrainingLoop):
    """Deepopt's loop for a model of which a part is trained; checkpoints hold that part alone."""

    def _state(self) -> dict[str, Tensor]:
        biases = {name: buffer for name, buffer in self.model.named_buffers()
                  if name.endswith("e_score_correction_bias")} if self.config.bias_speed else {}
        return {**{name: p.detach() for name, p in trained(self.model).items()}, **biases}

    def _write(self, path: Path, add: Callable[[Path], None], state: Mapping[str, Tensor] | None = None) -> Path:
        state = self._state() if state is None else state
        with replace_folder(path) as folder:
            save_file({name: t.cpu().contiguous() for name, t in state.items()}, folder / "trained.safetensors")
            add(folder)
            write_manifest(folder)
        return path

    def _read(self, folder: Path) -> None:
        check_manifest(folder)
        saved = load_file(folder / "trained.safetensors")
        for name, tensor in self._state().items():
            tensor.copy_(saved[name])

    def _finish(self) -> None:
        """Do nothing: the caller writes the result."""


class TuneTrainer(PartialTrainer):
    """Trains over records."""

    def __init__(self, tuned: TunedModel, data: RecordSet, general: RecordSet, config: TrainConfig, out: Path, *,
                 general_batches: int, general_name: str, settings: Mapping[str, Any], began: float, extend: bool
                 ) -> None:
        self.general, self.general_batches, self.general_name = general, general_batches, general_name
        self.last: dict[str, Any] = {}
        self.found: HeldOut | None = None  # of the records, in the last evaluation
        super().__init__(tuned.model, data, config, out, tuned.tokenizer, settings=settings, extend=extend)
        self.data: RecordSet = data
        self.began = began
        if is_quantized(tuned.model):
            tuned.model.compute_dtype = torch.float32

    def before(self) -> dict[str, Any]:
        """Evaluate the base, once per run. sums, counts: HeldOut of the records, absent in runs of old versions."""
        path = self.out / "before.json"
        if not path.is_file():
            assert self.step == 0
            evaluation, found = self.evaluate(), self.found
            assert found is not None
            write_json(path, evaluation | {"sums": found.sum_N.tolist(), "counts": found.count_N.tolist()})
        return json.loads(path.read_text(encoding="utf-8"))

    def evaluate(self) -> dict[str, Any]:
        """Compute the loss on held-out records and on general text; also stored in `last`."""
        records = len(self.data.evaluated(self.config.batch_size, self.config.eval_batches))
        windows = len(self.general.evaluated(self.config.batch_size, self.general_batches))
        self.found = held_out_loss(self.model, self.data, self.config, desc=f"evaluate {records:,} held-out records")
        general = held_out_loss(self.model, self.general, self.config, batches=self.general_batches,
                                desc=f"evaluate {windows:,} windows of general text ({self.general_name})")
        self.last = {"step": self.step, "eval_loss": self.found.mean, "general_loss": general.mean}
        return self.last
