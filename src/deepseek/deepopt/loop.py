"""The training loop. A killed run resumes bit for bit.

Everything that the next step depends on is either a pure function of the step number (which windows of the data come,
the learning rate) or part of the checkpoint (weights, gate biases, the optimizer's state, the random state). A
checkpoint is one folder that appears in one rename, so at any instant the newest `checkpoint-N` is whole; a run that
was killed starts again from it and takes the same steps with the same numbers. The log is cut back to that step. The
random state is the CPU's and, where the model is on a GPU, that GPU's. Of several ranks this holds with even shares of
the batches; where these go by speed (shares.py), they are summed in another order.

A run may be extended: more steps than it was started with are a further leg of its schedule (settings.py).

    OUT/settings.json           what the run was started with; another setting in the same folder is refused
    OUT/tokens/                 the packed data
    OUT/checkpoint-000200/      a Hugging Face checkpoint, with optimizer.safetensors and trainer.json beside it
    OUT/log.jsonl, loss.png     one line a step and one an evaluation; the curve
    OUT/model/                  the finished model
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..atlas import Atlas, RoutingAccuracy
from ..checkpoint import load_model, save_model, to_dtype, with_state, write_tensors
from ..data.shards import Batch
from ..errors import ConfigError
from ..files import take_lock, write_json
from ..interrupts import came, handled, held, kept
from ..model import CausalLM, TrainingLoss, max_violation
from ..ops.loss import IGNORE
from ..ops.saved import Saver
from ..progress import ProgressBar
from ..tokenizer import Tokenizer
from .device import arithmetic, compute_dtype, keep_arithmetic, random_state, set_random_state
from .evaluation import HeldOutBatches, held_out_loss
from .gradients import gradient_sum
from .optimizers import make_optimizer, narrow, trained
from .own_state import read_own, write_own
from .plot import plot_run
from .ranks import Ranks
from .run_folder import CHECKPOINT, SETTINGS, NoLog, RunLog, checkpoints, kept_in, refuse_other_run, run_in
from .saving import Saving, copies
from .settings import Leg, TrainConfig, learning_rate
from .shares import Shares


class Windows(HeldOutBatches, Protocol):
    """Training data: `TokenShards`, or records (tune.records.RecordSet)."""

    experts: tuple[str, ...]

    @property
    def fingerprint(self) -> str: ...

    def batch(self, step: int, batch_size: int, seq_len: int, *, seed: int) -> Batch: ...


class TrainingLoop:
    """Trains `model` in place on `data` and leaves everything under `out`.

    Starts from the newest checkpoint in `out` if there is one. Raises ConfigError when `out` holds a run with other
    settings; more steps extend it, unless `extend` is False. settings: further ones that must be the same, by part.
    about: what settings.json says besides. atlas: of the checkpoint that the run starts from. dtype: of OUT/model.
    ranks: the processes that take the steps together (ranks.py); the first one writes.
    """

    own: frozenset[str] = frozenset()  # parameters of which a rank has what no other has (expert_parallel.py, fsdp.py)
    together = False  # a forward pass of one rank needs all others in it

    def __init__(self, model: CausalLM, data: Windows, config: TrainConfig, out: str | Path,
                 tokenizer: Tokenizer | None = None, *, settings: Mapping[str, Any] | None = None,
                 about: Mapping[str, Any] | None = None, atlas: Atlas | None = None,
                 dtype: torch.dtype = torch.float32, extend: bool = True, ranks: Ranks | None = None) -> None:
        self.model, self.data, self.config, self.tokenizer = model, data, config, tokenizer
        self.out, self.atlas, self.extend = Path(out), atlas, extend
        self.dtype = torch.bfloat16 if config.weights == "bf16" else dtype
        self.ranks = Ranks() if ranks is None else ranks
        if config.accumulation < self.ranks.size:
            raise ConfigError(f"accumulation = {config.accumulation}: must be at least the number of ranks "
                              f"({self.ranks.size}): the batches of a step are divided among them")
        self.shares = Shares(config.accumulation, self.ranks.size, moves=config.balance and not self.together)
        self.step = 0
        self.began, self.seconds_before = time.perf_counter(), 0.0  # of this process; that earlier ones worked on it
        self.accuracy: RoutingAccuracy | None = None  # of the last evaluation
        self.model.compute_dtype = compute_dtype(config, model)
        keep_arithmetic(self.ranks.from_first(arithmetic(model)), config, model)  # each rank has measured for itself
        self.model.gradient_checkpointing = config.gradient_checkpointing
        self.model.saver = Saver() if config.activations == "fp8" else None
        if config.weights == "bf16":
            narrow(model)
        self.optimizer = make_optimizer(model, config)
        self.gates = [block.gate for block in model.moe_blocks().values()]
        self.guided = bool(data.experts) and config.guide_weight > 0
        # what names built in by training rest on: no group gains against another
        self.within_groups = self.guided or (atlas is not None and any(g.kind == "built-in" for g in atlas.groups))
        self.saving = Saving()
        self._saved = 0  # the step of the newest checkpoint
        self._stopping = False  # a rank was asked to
        self._busy = False  # inside a step, where weights and step number do not belong together
        _names_fit(model, data.experts)
        with self.ranks.first_here() as owns:
            self._claim_folder(settings or {}, about or {}, owns)
        self.gradients = gradient_sum(config, self.ranks)
        with self._served():
            if self.ranks.first:
                self._resume()
        self._spread()

    # ---- the loop ---------------------------------------------------------------------------------------------

    def run(self, on_step: Callable[[dict[str, Any]], None] | None = None) -> CausalLM:
        """Take the remaining steps; returns the model, which is also saved in OUT/model.

        Ctrl-C and SIGTERM: the step is finished and a checkpoint written before KeyboardInterrupt goes on, which notes
        what is kept. A second one leaves at once.
        """
        # unlocked afterwards, even where a traceback keeps this object
        with self._lock, handled(), kept(self.kept), self.saving, self._together():
            self._take_steps(on_step)
            self.model.eval()
            self._finish()
        return self.model

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Where there are several ranks, a signal waits until all of them have agreed on the step that is the last."""
        with held("the step is finished by all ranks and saved") if self.ranks.size > 1 else contextlib.nullcontext():
            yield

    def worked(self) -> float:
        """Seconds that this process and earlier ones have worked on the run."""
        return self.seconds_before + time.perf_counter() - self.began

    def kept(self) -> str:
        """Describe what is saved when the run stops."""
        return (f"left inside step {self.step + 1}; " if self._busy else "") + kept_in(self.out)

    def _take_steps(self, on_step: Callable[[dict[str, Any]], None] | None) -> None:
        config = self.config
        bar = ProgressBar(total=config.steps, initial=self.step, unit="step", desc="train",
                          disable=not self.ranks.first)
        log = RunLog(self.out, self.step, config.tensorboard) if self.ranks.first else NoLog()
        try:
            due = self.step == config.steps or self.step % config.eval_every == 0
            if self.ranks.from_first(bool(self.step and due and not log.evaluated)):
                self._look(log, bar)  # the run was stopped before it could
            while self.step < config.steps:
                with held(f"step {self.step + 1} is finished and saved"):
                    began, sent, shares = time.perf_counter(), self.ranks.sent, self.shares.now
                    record = self.train_step()
                    seconds = time.perf_counter() - began
                    record |= {"tokens_per_second": round(self._tokens / seconds), "seconds": round(seconds, 4)}
                    if self.ranks.size > 1:
                        record |= {"bytes_sent": self.ranks.sent - sent,
                                   "shares": {str(rank): share for rank, share in enumerate(shares)},
                                   "efficiency": round(1 - self._waited / seconds, 4)}
                    log.write(record)
                bar.set_postfix_str(f"loss {record['loss']:.3f}  MaxVio {record['max_vio']:.2f}  "
                                    f"{record['tokens_per_second']:,} tokens/s")
                bar.update()
                if on_step is not None:
                    on_step(record)
                last = self.step == config.steps
                if last or self.step % config.eval_every == 0:
                    self._look(log, bar)
                if last or self.step % config.save_every == 0:
                    self.save()
                if self._stopping:
                    raise KeyboardInterrupt("a signal came to one of the ranks")
        except KeyboardInterrupt:
            if self.step and not self._busy:
                self.save()
            raise
        finally:
            bar.close()
            log.close()

    def _look(self, log: RunLog | NoLog, bar: ProgressBar) -> None:
        """Evaluate, print the result and plot the run."""
        log.write(evaluation := self.evaluate())
        if "eval_loss" in evaluation:
            bar.write(f"step {self.step}: held-out loss {evaluation['eval_loss']:.4f} "
                      f"(perplexity {math.exp(min(evaluation['eval_loss'], 50)):.1f})"
                      + (f"\n{self.accuracy.table()}" if self.accuracy and self.data.experts else ""))
        if self.ranks.first:
            plot_run(self.out / "log.jsonl", self.out / "loss.png")

    def train_step(self) -> dict[str, Any]:
        """One optimizer step; returns its log record."""
        config, model = self.config, self.model
        self.saving.check()
        model.train()
        rate = learning_rate(self.legs, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        sums = {"loss": 0.0, "mtp_loss": 0.0, "balance_loss": 0.0} | ({"guide_loss": 0.0} if self.guided else {})
        load_LE: Tensor | None = None
        numbers = self._numbers()
        batches = [self.data.batch(number, config.batch_size, config.seq_len, seed=config.seed) for number in numbers]
        tokens = [int(b.ids_BT.numel() if b.real_BT is None else b.real_BT.sum()) for b in batches]
        self._tokens = sum(tokens)
        counts = [int((batch.labels_BT != IGNORE).sum()) for batch in batches]
        self._busy = True
        self.ranks.at(f"step {self.step + 1}")
        began = time.perf_counter()
        for micro in self.ranks.part(len(numbers), self.shares.now):
            batch, share = batches[micro].to(model.device), counts[micro] / max(sum(counts), 1)  # as if all were one
            result = self._loss(batch, numbers[micro])
            (result.total * share).backward()
            for key, value in (("loss", result.main), ("mtp_loss", result.mtp), ("balance_loss", result.balance),
                               ("guide_loss", result.guide)):
                if value is not None:
                    sums[key] += value.item() * share
            load_LE = result.load_LE if load_LE is None else load_LE + result.load_LE
        assert load_LE is not None
        load_LE = self._exchange(sums, load_LE, tokens, time.perf_counter() - began)
        if not math.isfinite(sums["loss"]):
            raise ConfigError(f"lr = {config.lr}: the loss became {sums['loss']} at step {self.step + 1}; a lower one "
                              f"may help (the last checkpoint is whole)")
        norm = self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._balance(load_LE)
        self.step += 1
        self._busy = False
        max_vio = float(max_violation(load_LE).mean()) if load_LE.numel() else 0.0
        return {"step": self.step, **sums, "lr": rate, "grad_norm": float(norm), "max_vio": max_vio}

    def _exchange(self, sums: dict[str, float], load_LE: Tensor, tokens: Sequence[int], seconds: float) -> Tensor:
        """Sum the gradients, losses and loads of the ranks; returns the loads. tokens: of each batch; seconds: that
        this rank has computed, by which the next batches are divided."""
        if (size := self.ranks.size) == 1:
            return load_LE
        began, mine = time.perf_counter(), [seconds * (rank == self.ranks.rank) for rank in range(size)]
        said = torch.tensor([float(came()), *sums.values(), *mine], dtype=torch.float32, device=load_LE.device)
        extra = torch.cat([said, load_LE.flatten().float()])  # loads are exact up to 2^24 tokens
        self.gradients.sum_({name: p.grad for name, p in trained(self.model).items()
                             if p.grad is not None and name not in self.own}, extra)
        self._stopping = bool(extra[0] > 0)
        sums.update(zip(sums, extra[1 : 1 + len(sums)].tolist(), strict=True))
        computed = extra[1 + len(sums) : len(said)].tolist()
        # of all on the average, who end together: one that has computed for less time than this rank has waited longer
        self._waited = max(0.0, time.perf_counter() - began + seconds - sum(computed) / size)
        self.shares.take(self.step + 1, tokens, computed)
        return extra[len(said) :].round().long().view_as(load_LE)

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Mean loss per token over held-out windows, where there are any; where the data has expert names, how well
        routing follows them (`RoutingAccuracy.record`; the counts stay in `accuracy`)."""
        self.model.eval()
        self.accuracy = RoutingAccuracy(self.model.config, self.data.experts)
        loss = held_out_loss(self.model, self.data, self.config, self.accuracy if self.data.experts else None,
                             ranks=self.ranks, together=self.together).mean
        return {"step": self.step} | ({} if loss is None else {"eval_loss": loss}) | (
            self.accuracy.record() if self.data.experts else {})

    # ---- checkpoints ------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Begin to write checkpoint-STEP, where it is not there, and drop all but the newest `keep`; where memory has
        room for a copy, training continues meanwhile (saving.py)."""
        if self.step == self._saved:
            return
        self.saving.wait()
        with held(f"checkpoint {self.step} is begun"):
            self._write_own()
            copied = self._copied()
            with self._served():
                if self.ranks.first:
                    self._save_shared(copied)
            self._saved = self.step

    def _copied(self) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None:
        """Copies of the model's state and of the moments, on the first rank; None where there is no room for them, or
        the first rank has not all of it."""
        if self.own or not self.ranks.first:
            return None
        state, moments = copies(self._state()), copies(self._moments())
        return None if state is None or moments is None else (state, moments)

    def _save_shared(self, copied: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None) -> None:
        """Begin to write what is the same on all ranks."""
        path, random = self.out / CHECKPOINT.format(self.step), random_state(self.model.device)
        state, moments = copied or (None, self._moments())
        about = {"step": self.step, "seconds": round(self.worked(), 3)} | arithmetic(self.model) | (
            self._division() if self.ranks.size > 1 else {})

        def add(folder: Path) -> None:
            write_tensors(folder / "optimizer.safetensors", {**moments, **random}, self._elsewhere)
            write_json(folder / "trainer.json", about)

        def write() -> None:
            self._write(path, add, state)
            for old in checkpoints(self.out)[: -self.config.keep]:
                shutil.rmtree(old)

        self.saving.start(write, behind=copied is not None)

    def _write_own(self) -> None:
        """Write what only this rank has; a checkpoint that is there has it of all ranks."""
        if own := self.gradients.state_dict():
            write_own(self.out, self.ranks.number, self.step, own, {"ranks": self.ranks.size})
        self.ranks.gather(None)

    def _optimizer_state(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, parameter in trained(self.model).items():
            if parameter in self.optimizer.state:
                yield name, self.optimizer.state[parameter]

    def _moments(self) -> dict[str, Tensor]:
        return {f"{name}.{key}": value for name, state in self._optimizer_state() for key, value in state.items()}

    # what a subclass may do otherwise, or keep elsewhere

    def _division(self) -> dict[str, Any]:
        """How the work is divided over the ranks, as a checkpoint keeps it."""
        return {"shares": self.shares.state()}

    def _divide(self, about: Mapping[str, Any]) -> None:
        """Restore what `_division` has returned, where it is of as many ranks."""
        self.shares.load(about.get("shares"))

    def _served(self) -> contextlib.AbstractContextManager[None]:
        """Inside it the first rank can ask the others for what they have of their own."""
        return contextlib.nullcontext()

    def _elsewhere(self, name: str) -> Iterable[Tensor]:
        """The parts of a tensor that this rank has not, on disk one after the other."""
        raise AssertionError(f"{name} is here")

    def _clip(self) -> Tensor:
        """Scale gradients down to a norm of `clip`; returns the norm that they had."""
        return torch.nn.utils.clip_grad_norm_(list(trained(self.model).values()), self.config.clip)

    def _numbers(self) -> range:
        """The batches of the step, of all ranks."""
        return range(self.step * self.config.accumulation, (self.step + 1) * self.config.accumulation)

    def _balance(self, load_LE: Tensor) -> None:
        """Move the biases of the gates."""
        if self.config.bias_speed:
            for gate, load_E in zip(self.gates, load_LE, strict=False):  # without MTP loss its gate saw nothing
                if hasattr(gate, "e_score_correction_bias"):
                    gate.update_bias(load_E, self.config.bias_speed, within_groups=self.within_groups)

    def _loss(self, batch: Batch, number: int) -> TrainingLoss:
        """Losses of a batch on the model's device. number: how many batches of the data came before it."""
        config = self.config
        return self.model.loss(batch.ids_BT, batch.labels_BT, mask_BT=batch.real_BT, mtp_weight=config.mtp_weight,
                               balance_weight=config.balance_weight, guide_weight=config.guide_weight,
                               group_BT=batch.expert_BT if self.guided else None)

    def _state(self) -> dict[str, Tensor]:
        """What a checkpoint has of the model."""
        return self.model.state_dict()

    def _write(self, path: Path, add: Callable[[Path], None], state: Mapping[str, Tensor] | None = None) -> Path:
        """Write the model, or a state that it had, and what `add` puts beside it, as one folder."""
        model = self.model if state is None else with_state(self.model, state)
        return save_model(model, path, tokenizer=self.tokenizer, add=add)

    def _read(self, folder: Path) -> None:
        """Restore the state of the model."""
        restored = load_model(folder, dtype=torch.float32, device=self.model.device)
        self.model.load_state_dict(restored.state_dict())

    def _finish(self) -> None:
        if self.guided and self.accuracy is None:  # nothing was left to train
            self.evaluate()
        to_dtype(self.model, self.dtype)
        with self._served():
            if self.ranks.first:
                self._write(self.out / "model", self._add_atlas)

    def _add_atlas(self, folder: Path) -> None:
        atlas = self.atlas
        if self.guided:
            accuracy = self.accuracy.by_name() if self.accuracy else {}
            bound = Atlas.built_in(self.model.config, self.data.experts, {
                name: {"routing_accuracy": found} for name, found in accuracy.items()})
            atlas = bound if atlas is None else atlas.updated(Atlas(bound.shape, [
                group for group in bound.groups if group.name in accuracy or group.name not in atlas.names]))
        if atlas is not None:
            atlas.save(folder)

    def _resume(self) -> None:
        found = checkpoints(self.out)
        if not found:
            return
        folder = found[-1]
        self._read(folder)  # checks the manifest, optimizer.safetensors included
        stored = load_file(folder / "optimizer.safetensors")
        moments = {name.replace(".entrance.", ".input."): tensor for name, tensor in stored.items()}  # its name in 0.1
        about = json.loads((folder / "trainer.json").read_text())
        self.step, self.seconds_before = about["step"], about.get("seconds", 0.0)
        keep_arithmetic(about, self.config, self.model)
        self._divide(about)
        self._saved = self.step
        set_random_state(moments, self.model.device)
        parameters, states = trained(self.model), defaultdict[str, dict[str, Tensor]](dict)
        for place, tensor in moments.items():
            name, _, key = place.rpartition(".")
            states[name][key] = tensor
        for name in parameters.keys() & states.keys():
            if "exp_avg" in states[name]:
                states[name].setdefault("step", torch.tensor(float(self.step)))  # some old checkpoints have none
                if states[name]["exp_avg"].dtype == torch.int8:
                    raise ConfigError(f"{folder}: AdamW's moments of 8 bits have codes of an older form, which is not "
                                      "read any more; to go on from its weights, give it as --from of another run")
            self._restore(name, parameters[name], states[name])

    def _restore(self, name: str, parameter: Tensor, state: Mapping[str, Tensor]) -> None:
        """Give the optimizer its state of one parameter."""
        self.optimizer.state[parameter] = {key: tensor.to(parameter.device) for key, tensor in state.items()}

    def _spread(self) -> None:
        """Give all ranks the first one's state; each has what it did not send yet in a file of its own."""
        if self.ranks.size == 1:
            return
        ranks, named = self.ranks, trained(self.model)
        ranks.at("the start")
        self.step, self.seconds_before, division = ranks.from_first((
            self.step, self.seconds_before, self._division()))
        self._divide(division)
        self._saved = self.step
        ranks.copy_from_first([tensor for name, tensor in self.model.state_dict().items() if name not in self.own])
        own = {name: {key: (tuple(value.shape), value.dtype) for key, value in state.items()}
               for name, state in self._optimizer_state() if name not in self.own}
        for name, state in ranks.from_first(own).items():
            here = self.optimizer.state[named[name]]
            for key, (shape, dtype) in state.items():
                if key not in here:
                    here[key] = torch.zeros(shape, dtype=dtype, device=named[name].device)
            ranks.copy_from_first([here[key] for key in state])
        # a rank that was not there, and any where their number was another, has no error to make up for
        if (found := read_own(self.out, ranks.number, self.step)) and found[1]["ranks"] == str(ranks.size):
            self.gradients.load_state_dict({key: t.to(self.model.device) for key, t in found[0].items()})

    def _claim_folder(self, more: Mapping[str, Any], about: Mapping[str, Any], owns: bool) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self._lock = (self.out / (f".lock-{self.ranks.number}" if self.ranks.number else ".lock")).open("w")
        take_lock(self._lock, self.out)
        for leftover in (*self.out.glob(".checkpoint-*"), *self.out.glob(".model.*")) if owns else ():
            shutil.rmtree(leftover)  # of a killed write
        config, model = self.config, self.model.config
        settings = {"train": asdict(config), "model": model.to_dict(), "data": {"fingerprint": self.data.fingerprint},
                    **more}
        legs = refuse_other_run(self.out, settings, extend=self.extend)
        self.legs = [*(Leg(**leg) for leg in legs), Leg.of(config)]
        settings |= {"legs": legs, "about": dict(about)}
        known = run_in(self.out)
        if owns and (known is None or known["train"] != settings["train"] or known.get("legs", []) != legs):
            write_json(self.out / SETTINGS, settings)


def _names_fit(model: CausalLM, names: tuple[str, ...]) -> None:
    groups = model.config.n_group
    if len(names) > groups:
        raise ConfigError(f"{len(names)} expert names ({', '.join(names)}): the model has {groups} routing groups, "
                          f"n_group must be at least {len(names)}")
