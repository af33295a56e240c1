"""Training in rounds: each rank takes `inner_steps` of its own, then all merge what they have changed.

    Delta_i = theta - theta_i      what rank i has changed in the round, from the weights theta that all began with
    sent_i  = Q(e_i + Delta_i)     coded (compress.py), and e_i = e_i + Delta_i - sent_i kept for the next round
    theta <- theta - outer(sum_i w_i sent_i)      w_i: its share of the round's tokens; outer: SGD, Nesterov momentum

(DiLoCo, arXiv 2311.08105; two bits a value as in MuLoCo, 2505.23725; the largest values alone as in SparseLoCo,
2508.15706.) Weights are equal on all ranks at the beginning of a round, moments of the inner optimizer stay where they
are. The gates' biases are no gradients: each step's loads are sent along, and the biases go as they would have gone on
the sum.

A step of the schedule takes `accumulation` batches, divided among the ranks, as it would without rounds. A slow rank
takes fewer steps in a round (`balance`): in proportion to its speed, as everybody measures its own.

Ranks come and go between rounds (members.py). The lowest of them that has the weights writes log and checkpoints; every
rank keeps in OUT/rank-RRRR what only it has.
"""

from __future__ import annotations

import contextlib
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from ..files import to_json
from ..interrupts import came, held
from ..progress import ProgressBar
from .compress import CODECS, ErrorFeedback, OuterNesterov
from .loop import TrainingLoop
from .members import Members, Verdict, pieces
from .optimizers import trained
from .own_state import read_own, write_own
from .ranks import Ranks, even
from .run_folder import NoLog, RunLog

PATIENCE = 600.0  # seconds that a rank waits to be let in, at least: it comes in at the end of a round
SPEED = 0.5  # weight of the newest measurement


class Solo(Ranks):
    """A rank whose steps are its own. leads: it writes log and checkpoints."""

    def __init__(self, members: Members, local_rank: int) -> None:
        super().__init__()
        self.members, self.number, self.local_rank = members, members.rank, local_rank
        self.leads, self.waits = True, 0

    @property
    def first(self) -> bool:
        return self.leads

    @contextlib.contextmanager
    def first_here(self) -> Iterator[bool]:
        key = f"prepared/{platform.node()}/{self.waits}"
        self.waits += 1
        if self.local_rank == 0 and not self.members.there("r-1/verdict"):
            yield True
            self.members.put(key, b"")
        else:
            self.members.prepared(key)
            yield False


class RoundLoop(TrainingLoop):
    """The loop of one rank. Arguments as of TrainingLoop."""

    ranks: Solo

    def __init__(self, *args: Any, ranks: Solo, **more: Any) -> None:
        super().__init__(*args, ranks=ranks, **more)
        config = self.config
        self.members = ranks.members
        length, decay, lr, momentum = (config.inner_steps, config.error_decay, config.outer_lr, config.outer_momentum)
        assert length is not None and decay is not None and lr is not None and momentum is not None
        self.length = length  # steps of a round, of the fastest rank
        self.feedback = ErrorFeedback(CODECS["2bit" if config.compress == "local" else "sparse"], decay)
        self.outer = OuterNesterov(lr, momentum)
        self.round, self.begin = self.step // length, self.step * config.accumulation
        self.taking: list[int] = []  # the ranks of this round
        self.steps: dict[int, int] = {}  # that each of them takes
        self.done = 0  # own steps in this round
        self.loads: list[Tensor] = []
        self.speed = 0.0
        self.log: RunLog | NoLog = NoLog()
        if self.step:
            self._read_own()

    # ---- the loop ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        with held("the round is finished"):
            yield

    def _take_steps(self, on_step: Callable[[dict[str, Any]], None] | None) -> None:
        config = self.config
        self._start()
        bar = ProgressBar(total=config.steps, initial=self.step, unit="step", desc=f"rank {self.members.rank}")
        try:
            while self.step < config.steps:
                record = self._take_round(bar)
                if record is None:
                    raise KeyboardInterrupt("a signal came to this rank")
                if on_step is not None:
                    on_step(record)
        finally:
            bar.close()
            self.log.close()

    def _take_round(self, bar: ProgressBar) -> dict[str, Any] | None:
        """Returns the record of the log, or None where this rank leaves."""
        config, members, start = self.config, self.members, self.step
        theta = {name: p.detach().clone() for name, p in trained(self.model).items()}
        biases = [gate.e_score_correction_bias.clone() for gate in self._balanced()]
        self.loads, losses, tokens, mine = [], [], 0, self.steps[members.rank]
        length = min(max(self.steps.values()), config.steps - start)
        mine = max(1, min(mine, length))
        began = time.monotonic()
        for self.done in range(mine):
            self.step = start + self.done * length // mine
            record = self.train_step()
            losses.append(record["loss"])
            tokens += self._tokens
            bar.set_postfix_str(f"loss {record['loss']:.3f}")
            bar.advance_to(start + (self.done + 1) * length // mine)
        seconds = time.monotonic() - began
        self.speed = tokens / seconds if not self.speed else (1 - SPEED) * self.speed + SPEED * tokens / seconds
        self.step = start + length
        members.sent = members.received = 0
        members.waited = 0.0
        part = b"".join([
            *(self.feedback.encode(name, theta[name] - p.detach()).numpy().tobytes()
              for name, p in trained(self.model).items()),
            torch.stack(self.loads).int().numpy().tobytes()])
        members.finish(self.round, {"tokens": tokens, "steps": mine, "speed": self.speed, "leaving": came(),
                                    "loss": sum(losses) / len(losses)}, part)
        verdict = members.decide(self.round, self._verdict(members.wait(self.round, self.taking)))
        if members.rank not in verdict.merged:  # it came too late
            self._join()
            return {"step": self.step, "late": True}
        said = {rank: members.about(self.round, rank) for rank in verdict.merged}
        total = sum(one["tokens"] for one in said.values())
        self._merge(theta, biases, part, said, {rank: one["tokens"] / total for rank, one in said.items()})
        wall = time.monotonic() - began
        record = {"step": self.step, "round": self.round, "loss": sum(
            one["loss"] * one["tokens"] for one in said.values()) / total, "lr": record["lr"],
            "grad_norm": record["grad_norm"], "max_vio": record["max_vio"], "tokens_per_second": round(total / wall),
            "seconds": round(wall, 4), "ranks": verdict.merged,
            "steps": {str(rank): one["steps"] for rank, one in said.items()},
            "efficiency": round(seconds / wall, 4), "waited": round(members.waited, 3),
            "bytes_sent": members.sent, "bytes_received": members.received}
        return self._close(start, verdict, record, bar)

    def _close(self, start: int, verdict: Verdict, record: dict[str, Any], bar: ProgressBar) -> dict[str, Any] | None:
        """Write what is due, take in who joins, and go over to the next round."""
        config, members, stays = self.config, self.members, [r for r in verdict.members if r not in verdict.joining]
        last = self.step >= config.steps or not stays
        due = {name: last or start // every != self.step // every
               for name, every in (("eval", config.eval_every), ("save", config.save_every))}
        self.round, self.begin = self.round + 1, verdict.begin
        self.taking, self.steps = verdict.members, verdict.steps
        self._lead(members.rank == min(stays or verdict.merged))
        self.log.write(record)
        if self.ranks.leads:
            state = self._state_of_all() if verdict.joining else b""
            for rank in verdict.joining:
                members.admit(rank, self.round, state)
        if due["save"]:
            self._write_own()
            if self.ranks.leads:
                self.save()
        if due["eval"] and self.ranks.leads:
            self._look(self.log, bar)
        members.forget(f"r{self.round - 3}/")
        return record if members.rank in verdict.members or (last and self.step >= config.steps) else None

    def _verdict(self, present: Sequence[int]) -> Verdict:
        """What this rank would decide on the round."""
        said = {rank: self.members.about(self.round, rank) for rank in present}
        joining = self.members.asking(self.taking)
        staying = [rank for rank in present if not said[rank]["leaving"]]
        members = sorted([*staying, *joining]) if staying else []
        fastest = max((said[rank]["speed"] for rank in staying), default=1.0)
        steps = {rank: max(1, round(self.length * said[rank]["speed"] / fastest))
                 if self.config.balance and rank in said else self.length for rank in members}
        begin = self.begin + sum(self.steps[rank] * part for rank, part in zip(
            self.taking, even(self.config.accumulation, len(self.taking)), strict=True))
        return Verdict(list(present), members, joining, steps, begin)

    @torch.no_grad()
    def _merge(self, theta: dict[str, Tensor], biases: list[Tensor], own: bytes, said: dict[int, dict[str, Any]],
               weights: dict[int, float]) -> None:
        """Go from the weights that the round began with to the next ones, the same on every rank."""
        merged = {name: torch.zeros_like(value) for name, value in theta.items()}
        sizes = [self.feedback.codec.nbytes(tuple(value.shape)) for value in theta.values()]
        loads = []
        for rank, about in said.items():
            payload = own if rank == self.members.rank else self.members.part(self.round, rank)
            *parts, load = pieces(payload, [*sizes, len(payload) - sum(sizes)])
            for (name, value), part in zip(theta.items(), parts, strict=True):
                sent = self.feedback.codec.decode(torch.from_numpy(np.frombuffer(part, np.uint8).copy()), value.shape)
                merged[name] += weights[rank] * sent
            loads.append(torch.from_numpy(np.frombuffer(load, np.int32).copy()).view(
                about["steps"], *self.loads[0].shape))
        self.outer.step(theta, merged)
        for name, parameter in trained(self.model).items():
            parameter.copy_(theta[name])
        for gate, bias in zip(self._balanced(), biases, strict=True):
            gate.e_score_correction_bias.copy_(bias)
        for step in range(max(about["steps"] for about in said.values())):
            super()._balance(torch.stack([load[step] for load in loads if step < len(load)]).sum(0))

    def _numbers(self) -> range:
        parts, rank = even(self.config.accumulation, len(self.taking)), self.members.rank
        place = self.taking.index(rank)
        before = sum(self.steps[other] * part for other, part in zip(self.taking[:place], parts, strict=False))
        first = self.begin + before + self.done * parts[place]
        return range(first, first + parts[place])

    def _balance(self, load_LE: Tensor) -> None:
        self.loads.append(load_LE)
        super()._balance(load_LE)

    def _balanced(self) -> list[Any]:
        return [gate for gate in self.gates if hasattr(gate, "e_score_correction_bias")]

    # ---- coming and going ----------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Begin with those who have the same weights; others get them."""
        members = self.members
        if members.there("r-1/verdict"):
            return self._join()
        members.finish(-1, {"key": self._key()}, b"")
        present = members.wait(-1, range(members.size))
        keys = {rank: members.about(-1, rank)["key"] for rank in present}
        same = [rank for rank in present if keys[rank] == keys[present[0]]]
        every = dict.fromkeys(present, self.length)
        verdict = members.decide(-1, Verdict(same, present, [r for r in present if r not in same], every, self.begin))
        if members.rank not in verdict.merged:
            return self._join()
        self.taking, self.steps = verdict.members, verdict.steps
        self._lead(members.rank == verdict.merged[0])
        if self.ranks.leads:
            state = self._state_of_all()
            for rank in verdict.joining:
                members.admit(rank, self.round, state)

    def _join(self) -> None:
        """Take what the others have."""
        self._lead(False)
        number, state = self.members.join(max(PATIENCE, self.config.rank_timeout))
        tensors = load(state)
        about = json.loads(tensors.pop("about").numpy().tobytes())
        self.model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in tensors.items()
                                    if name.startswith("model.")}, strict=False)
        self.outer.load_state_dict({name.removeprefix("outer."): tensor for name, tensor in tensors.items()
                                    if name.startswith("outer.")})
        self.feedback.load_state_dict({})
        self.step, self.begin, self.round, self.taking = about["step"], about["begin"], number, about["taking"]
        self.steps = {int(rank): steps for rank, steps in about["steps"].items()}

    def _state_of_all(self) -> bytes:
        """What a rank that joins needs."""
        about = {"step": self.step, "begin": self.begin, "taking": self.taking, "steps": self.steps}
        weights = dict(self._weights())
        return save({**{f"model.{name}": tensor.contiguous() for name, tensor in weights.items()},
                     **{f"outer.{name}": tensor for name, tensor in self.outer.state_dict().items()},
                     "about": torch.from_numpy(np.frombuffer(to_json(about).encode(), np.uint8).copy())})

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        """What is trained, and the biases, by name."""
        yield from ((name, p.detach()) for name, p in trained(self.model).items())
        yield from ((name, buffer) for name, buffer in self.model.named_buffers()
                    if name.endswith("e_score_correction_bias"))

    def _key(self) -> str:
        """Of what ranks must have in common to begin together."""
        key = blake2b(to_json([self.step, self.round, self.begin]).encode(), digest_size=16)
        for _, tensor in self._weights():
            key.update(tensor.contiguous().cpu().numpy().tobytes())
        return key.hexdigest()

    def _lead(self, leads: bool) -> None:
        if leads and not isinstance(self.log, RunLog):
            self.log = RunLog(self.out, self.step, self.config.tensorboard)
        elif not leads:
            self.log.close()
            self.log = NoLog()
        self.ranks.leads = leads

    # ---- what only this rank has -----------------------------------------------------------------------------------

    def _write_own(self) -> None:
        moments = {f"{name}.{key}": value for name, state in self._optimizer_state() for key, value in state.items()
                   if isinstance(value, Tensor)}
        tensors = {**{f"inner.{name}": value for name, value in moments.items()},
                   **{f"error.{name}": value for name, value in self.feedback.state_dict().items()},
                   **{f"outer.{name}": value for name, value in self.outer.state_dict().items()}}
        write_own(self.out, self.members.rank, self.step, tensors,
                  {"round": self.round, "begin": self.begin, "speed": self.speed})

    def _read_own(self) -> None:
        """Of the checkpoint that the run goes on from; a rank without one begins with moments and errors of zero."""
        if (found := read_own(self.out, self.members.rank, self.step)) is None:
            self.optimizer.state.clear()  # the checkpoint's are those of another rank
            return
        parts: dict[str, dict[str, Tensor]] = {"inner": {}, "error": {}, "outer": {}}
        for key, tensor in found[0].items():
            part, _, name = key.partition(".")
            parts[part][name] = tensor
        about = found[1]
        self.round, self.begin, self.speed = int(about["round"]), int(about["begin"]), float(about["speed"])
        for name, parameter in trained(self.model).items():
            self.optimizer.state[parameter].update({
                key.removeprefix(f"{name}."): value for key, value in parts["inner"].items()
                if key.rpartition(".")[0] == name})
        self.feedback.load_state_dict(parts["error"])
        self.outer.load_state_dict(parts["outer"])
