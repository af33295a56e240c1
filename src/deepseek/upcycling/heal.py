"""Healing: the experts, shared experts and gates of a carved model, or the attention of a latent form, are trained with
the dense model as the teacher.

    OUT.run/tokens/NAME/       the text of each name, packed
    OUT.run/targets/           the teacher's 16 best logits at every position of the training windows, in their order
    OUT.run/heal/              deepopt's run: checkpoints of what is trained, log.jsonl, loss.png

Each name gives every n-th window. The active share falls from 100 % to what is asked over the first `anneal` of the
steps, evaluations are always at the latter. Weights and moments are FP32, activations BF16 where the machine has units
for it. Everything is resumable: a killed run goes on at its last checkpoint, or at its last 64 windows of targets.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ..checkpoint import load_model, to_dtype
from ..checkpoint.files import TensorFiles
from ..checkpoint.models import stored_dtype
from ..data.shards import Batch, TokenShards, pack_cached
from ..deepopt.evaluation import held_out_loss
from ..deepopt.settings import TrainConfig
from ..errors import ConfigError
from ..files import read_json, write_atomically, write_json
from ..model import CausalLM, RoutingRecord, TrainingLoss, expert_load
from ..ops import fast_bf16
from ..progress import ProgressBar
from ..tokenizer import Tokenizer
from ..tune.loop import PartialTrainer
from .carve_settings import HealConfig
from .distil import Targets, best_of, distillation_loss
from .loop import slow_gates

CHUNK = 64  # windows of targets a file
ASKED = 4  # windows that the teacher reads at a time
EVALUATED = 200  # steps between evaluations at least: windows come once, so the losses of the steps tell as much
VALID = 0.02  # share of each text that is held out
GATE_LR = 0.1  # of the gates, as a share of the experts': their logits are small (grouping.py)


class HealData:
    """The text of several names: window i comes from name i modulo their number. experts: none are bound to names."""

    experts: tuple[str, ...] = ()

    def __init__(self, shards: Mapping[str, TokenShards], folder: Path, seq_len: int, seed: int) -> None:
        self.shards, self.folder, self.seq_len, self.seed = shards, folder, seq_len, seed
        self.chunk = lru_cache(maxsize=4)(self._chunk)
        for one in shards.values():
            one.windows(seq_len)  # too little text is said now

    @classmethod
    def pack(cls, places: Mapping[str, Sequence[str]], tokenizer: Tokenizer, run: Path, seq_len: int, seed: int
             ) -> HealData:
        """Pack the text of each name into RUN/tokens, where it is not there."""
        shards = {}
        for name, paths in places.items():
            with ProgressBar(desc=f"pack {name}", unit=" tokens", unit_scale=True) as bar:
                shards[name], report = pack_cached(
                    paths, tokenizer, run / "tokens" / name, valid_fraction=VALID,
                    progress=lambda _, tokens, bar=bar: bar.advance_to(tokens))  # type: ignore[misc]
            if report is not None:
                print(f"{name}: {report.summary()}", flush=True)
        return cls(shards, run / "targets", seq_len, seed)

    @property
    def fingerprint(self) -> str:
        parts = [(name, shards.fingerprint) for name, shards in self.shards.items()]
        return hashlib.sha256(json.dumps(parts, allow_nan=False).encode()).hexdigest()

    def window(self, number: int) -> Batch:
        """The window `number` of the run, as a batch of one."""
        shards = [*self.shards.values()]
        return shards[number % len(shards)].batch(number // len(shards), 1, self.seq_len, seed=self.seed)

    def batch(self, step: int, batch_size: int, seq_len: int, *, seed: int) -> Batch:
        assert (seq_len, seed) == (self.seq_len, self.seed), "targets are of these windows"
        rows = [self.window(number) for number in range(step * batch_size, (step + 1) * batch_size)]
        return Batch(*(torch.cat([row[part] for row in rows]) for part in range(3)))  # type: ignore[misc]

    def valid_batches(self, batch_size: int, seq_len: int, limit: int | None = None) -> Iterator[Batch]:
        for shards in self.shards.values():
            yield from shards.valid_batches(batch_size, seq_len, limit)

    # ---- what the teacher says ------------------------------------------------------------------------------------

    def targets(self, step: int, batch_size: int) -> Targets:
        """For each position of a batch, [B * T, K]."""
        rows = [divmod(number, CHUNK) for number in range(step * batch_size, (step + 1) * batch_size)]
        ids, log_p = (torch.cat([self.chunk(chunk)[part][row] for chunk, row in rows]) for part in ("ids", "log_p"))
        return Targets(ids.long(), log_p.float())

    def _chunk(self, number: int) -> dict[str, Tensor]:
        return load_file(self.folder / f"targets-{number:06d}.safetensors")

    @torch.inference_mode()
    def ask(self, teacher: CausalLM, windows: int) -> None:
        """Write the targets of the first `windows` windows that are not there. Raises ConfigError where those that are
        there were made for other text."""
        about = {"data": self.fingerprint, "seq_len": self.seq_len, "seed": self.seed, "windows": windows}
        self.folder.mkdir(exist_ok=True)
        key = self.folder / "about.json"
        if key.is_file() and (known := read_json(key, ConfigError)) != about:
            raise ConfigError(f"{self.folder}: was made for other text ({known}, now {about}): remove the folder")
        write_json(key, about)
        files = [self.folder / f"targets-{number:06d}.safetensors" for number in range(-(-windows // CHUNK))]
        ready = CHUNK * sum(file.is_file() for file in files)
        with ProgressBar(total=windows, initial=min(ready, windows), desc="ask the dense model", unit="window") as bar:
            for number, file in enumerate(files):
                if file.is_file():
                    continue
                found: list[Targets] = []
                last = min((number + 1) * CHUNK, windows)
                for window in range(number * CHUNK, last, ASKED):
                    ids_BT = torch.cat([self.window(one).ids_BT for one in range(window, min(window + ASKED, last))])
                    h_BTH = teacher.hidden(ids_BT)
                    found += [best_of(teacher.lm_head(h_TH).float()) for h_TH in h_BTH]
                    bar.update(len(ids_BT))
                narrow = torch.uint16 if teacher.config.vocab_size <= 1 << 16 else torch.int32
                write_atomically(file, save({"ids": torch.stack([one.ids for one in found]).to(narrow),
                                             "log_p": torch.stack([one.log_p for one in found]).half()}))


class HealLoop(PartialTrainer):
    """Deepopt's loop with the teacher's loss, at an active share that falls."""

    data: HealData

    def __init__(self, model: CausalLM, data: HealData, asked: HealConfig, out: Path) -> None:
        self.asked, self.kl = asked, 0.0
        self.asked_config = model.config
        steps = max(1, asked.heal_tokens // (asked.heal_batch * data.seq_len))
        config = TrainConfig(
            steps=steps, batch_size=asked.heal_batch, seq_len=data.seq_len, lr=asked.heal_lr, min_lr_ratio=0.0,
            warmup_steps=max(1, steps // 20), weight_decay=0.0, balance_weight=0.0, bias_speed=0.0, guide_weight=0.0,
            precision=asked.heal_precision, eval_every=max(EVALUATED, steps // 10), seed=asked.heal_seed,
            eval_batches=-(-asked.heal_evaluated // asked.heal_batch), save_every=asked.heal_saved, keep=1)
        kept = {"heal": {"kl_share": asked.kl_share, "anneal": asked.anneal}}
        super().__init__(model, data, config, out, settings=kept, extend=False)
        # narrow experts gain from BF16 units in a narrow model too (ops/experts.py)
        bf16 = fast_bf16(model.device.type) if asked.heal_precision == "auto" else asked.heal_precision == "bf16"
        model.compute_dtype = torch.bfloat16 if bf16 else torch.float32
        self.losses: dict[str, float] = {}  # of the last evaluation, by name
        slow_gates(self, GATE_LR)

    def active(self, step: int) -> int:
        """Experts a token in a step."""
        experts, top = self.asked_config.n_routed_experts, self.asked_config.num_experts_per_tok
        over = self.asked.anneal * self.config.steps
        return top if step >= over else round(experts - (experts - top) * step / over)

    def _activate(self, top: int) -> None:
        config = self.asked_config.with_(num_experts_per_tok=top, routed_scaling_factor=float(top))
        for gate in self.gates:
            gate.config = config

    def train_step(self) -> dict[str, Any]:
        self._activate(top := self.active(self.step))
        self.kl = 0.0
        try:
            return super().train_step() | {"kl": self.kl, "experts_per_token": top}
        finally:
            self._activate(self.asked_config.num_experts_per_tok)

    def _loss(self, batch: Batch, number: int) -> TrainingLoss:
        routing, model = RoutingRecord(), self.model
        h_MH = model.hidden(batch.ids_BT, routing=routing).flatten(0, 1)
        ids, log_p = (part.to(h_MH.device).flatten(0, -2) for part in self.data.targets(number, len(batch.ids_BT)))
        total, entropy, kl = distillation_loss(
            h_MH, model.lm_head.weight, batch.labels_BT.flatten(), Targets(ids, log_p), self.asked.kl_share)
        self.kl += float(kl) / self.config.accumulation
        experts = model.config.n_routed_experts
        loads = [expert_load(route.index_TK, experts) for route in routing.routes.values()]
        load_LE = torch.stack(loads) if loads else torch.zeros(0, experts, dtype=torch.long)
        return TrainingLoss(total, entropy, None, None, None, load_LE)

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        self.losses = losses = domain_losses(self.model, self.data, self.config)
        return {"step": self.step, "eval_loss": sum(losses.values()) / len(losses)} | {
            f"eval_loss_{name}": loss for name, loss in losses.items()}


def domain_losses(model: CausalLM, data: HealData, config: TrainConfig) -> dict[str, float]:
    """Held-out loss of each name's text."""
    found = {name: held_out_loss(model, shards, config, desc=f"evaluate {name}").mean
             for name, shards in data.shards.items()}
    return {name: loss for name, loss in found.items() if loss is not None}


def heal(run: Path, teacher_of: Callable[[torch.dtype], CausalLM], made: Path, places: Mapping[str, Sequence[str]],
         asked: HealConfig, seq_len: int, trained: Callable[[CausalLM], Iterable[Tensor]]
         ) -> tuple[CausalLM, dict[str, dict[str, float]]]:
    """Train what `trained` chooses of the model in `made`; returns it and held-out losses by name: of the dense model,
    before and after. teacher_of: loads the dense model in a dtype."""
    data = HealData.pack(places, Tokenizer.load(made), run, seq_len, asked.heal_seed)
    model = load_model(made, torch.float32).requires_grad_(False)
    for parameter in trained(model):
        parameter.requires_grad_(True)
    loop = HealLoop(model, data, asked, run / "heal")
    file = run / "losses.json"
    teacher = teacher_of(model.compute_dtype or torch.float32)
    if not file.is_file():
        write_json(file, {"dense": domain_losses(teacher, data, loop.config),
                          "before": domain_losses(model, data, loop.config)})
    data.ask(teacher, loop.config.steps * asked.heal_batch)
    del teacher
    loop.run()
    losses = read_json(file, ConfigError) | {"after": loop.losses or domain_losses(model, data, loop.config)}
    model.compute_dtype = None
    return to_dtype(model, stored_dtype(TensorFiles(made, verify=False))), losses
