"""Training in rounds: each rank takes `inner_steps` of its own, then all merge what they have changed.

    Delta_i = theta - theta_i      what rank i has changed in the round, from the weights theta that all agree on
    sent_i  = Q(e_i + Delta_i)     coded (compress.py), and e_i = e_i + Delta_i - sent_i kept for the next round
    theta <- theta - outer(sum_i w_i sent_i)      w_i: its share of the round's tokens; outer: SGD, Nesterov momentum

(DiLoCo, arXiv 2311.08105; two bits a value as in MuLoCo, 2505.23725; the largest values alone as in SparseLoCo,
2508.15706.) Moments of the inner optimizer stay where they are, but for the scale of AdamW's second ones
(second_moments.py). The gates' biases are no gradients: each step's loads are sent along, and the biases go as they
would have gone on the sum.

A rank goes on from the merged weights, and from what it has changed since it sent its part:

    theta_i <- theta + (theta_i - theta_i when sent)

Without `overlap_steps` it waits, and the second term is zero. With them it takes the first steps of the next round
while its part and the others' are on the line, and then the above: a merge delayed by some steps as in Streaming DiLoCo
(2501.18512), which keeps what was learnt meanwhile as local SGD with delayed averaging does (DaSGD, 2006.00441). So
each step counts in one Delta. Flights (flight.py) send and receive; steps decide when a merge is taken in, not clocks.

A step of the schedule takes `accumulation` batches, divided among the ranks, as it would without rounds. A slow rank
takes fewer steps in a round (`balance`): in proportion to its speed, which each rank measures itself.

Ranks come and go between rounds (members.py); with `overlap_steps` a round later, as another has begun when one is
decided on. The lowest of them that has the weights writes log and checkpoints; every rank keeps in OUT/rank-RRRR what
only it has, with `overlap_steps` its weights and the part that is under way too: a checkpoint's weights are then those
of the rank that wrote it. The end's are merged ones. Sites (sites.py) have data and a folder each, and all write.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from ..data import TokenShards
from ..files import to_json
from ..interrupts import came, held
from ..model import CausalLM
from ..progress import ProgressBar
from .agreed import Agreed, tensor_of
from .compress import of_bytes, to_bytes
from .flight import PATIENCE, Flight, batches_of, end_of
from .loop import TrainingLoop, Windows
from .members import Members, Solo, Verdict
from .optimizers import trained
from .own_state import parts_of, read_own, write_own
from .ranks import even
from .run_folder import NoLog, RunLog
from .saving import copies
from .second_moments import SecondMoments
from .settings import TrainConfig
from .sites import check_owners, divide, parts_on

SPEED = 0.5  # weight of the newest measurement
SAME = ("steps", "accumulation", "compress", "inner_steps", "overlap_steps", "outer_lr", "outer_momentum", "bias_speed",
        "guide_weight", "sites", "seed")  # settings that ranks must share


class RoundLoop(TrainingLoop):
    """The loop of one rank. Arguments as of TrainingLoop."""

    ranks: Solo

    def __init__(self, model: CausalLM, data: Windows, config: TrainConfig, *args: Any, ranks: Solo, **more: Any
                 ) -> None:
        assert ranks.apart == bool(config.sites)
        self.names: tuple[str, ...] = ()  # whose experts this rank trains
        if config.sites:
            assert isinstance(data, TokenShards)
            self.names = data.present
            divide(model, data.experts, self.names)
        super().__init__(model, data, config, *args, ranks=ranks, **more)
        self.base = (more.get("settings") or {}).get("base")
        self.members: Members = ranks.members
        assert config.inner_steps is not None and config.overlap_steps is not None
        self.length, self.overlap = config.inner_steps, config.overlap_steps  # steps of the fastest rank
        self.agreed = Agreed(config)
        self.agreed.begin(self._weights(), {
            name: group for name, group, _ in parts_on(model) if group in self.data.experts})
        self.second = SecondMoments(self.optimizer, [
            p for name, p in trained(model).items() if name not in self.agreed.owner])
        self.biases = self._biases()  # that all agree on
        self.round, self.begin = self.step // self.length, self.step * config.accumulation
        self.plans: list[Verdict] = []  # of this round, and of the next where it is decided on
        self.taking: list[int] = []  # the ranks of this round that are still there
        self.flight: Flight | None = None
        self.start = self.step  # where this round begins
        self.taken = 0  # batches of a site's own data, before this round
        self.done = 0  # own steps in this round
        self.loads: list[Tensor] = []  # of each of them
        self.speed = self.aside = 0.0  # aside: seconds of this round for evaluations and the like
        self.ends = False  # all ranks leave
        self.log: RunLog | NoLog = NoLog()
        self._told: Callable[[dict[str, Any]], None] | None = None
        if self.step:
            self._read_own()

    # ---- the loop ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        with held("the round is finished"):
            yield

    def _take_steps(self, on_step: Callable[[dict[str, Any]], None] | None) -> None:
        if self.step >= self.config.steps:  # all is trained; one that starts again after the others have ended writes
            self.ranks.leads = self.ranks.local_rank == 0 or self.members.there("r-1/verdict")
            return
        self._told = on_step
        self._start()
        bar = ProgressBar(total=self.config.steps, initial=self.step, unit="step", desc=f"rank {self.members.rank}")
        try:
            while self.step < self.config.steps:
                self._take_round(bar)
        finally:
            bar.close()
            self.log.close()

    def _take_round(self, bar: ProgressBar) -> None:
        """Raises KeyboardInterrupt where this rank is asked to leave."""
        config, start, began = self.config, self.step, time.monotonic()
        self.start = start
        length = self._length()
        mine = max(1, min(self.plans[0].steps[self.members.rank], length))
        when = -(-self.overlap * mine // self.length)  # own steps before the merge of the last round is taken in
        losses, tokens, seconds, self.aside = [], 0, 0.0, 0.0
        self.second.divide(batches_of(self.plans[0], config.accumulation))
        for self.done in range(mine):
            if self.done == when and not self._arrive(bar):
                return
            self.step, stepped = start + self.done * length // mine, time.monotonic()
            record = self.train_step()
            seconds += time.monotonic() - stepped
            losses.append(record["loss"])
            tokens += self._tokens
            bar.set_postfix_str(f"loss {record['loss']:.3f}")
            bar.advance_to(start + (self.done + 1) * length // mine)
        self.step = start
        if not self._arrive(bar):
            return
        self.step = start + length
        self.taken += mine * len(self._numbers())
        self.speed = tokens / seconds if not self.speed else (1 - SPEED) * self.speed + SPEED * tokens / seconds
        leaves = self._send({
            "tokens": tokens, "steps": mine, "speed": self.speed, "loss": sum(losses) / len(losses),
            "seconds": seconds, **{key: record[key] for key in ("lr", "grad_norm", "max_vio")},
            **({"own": self.names} if self.config.sites else {})}, start, began)
        waits = not self.overlap or self.step >= config.steps
        if waits and not self._arrive(bar):
            return
        due = start // config.save_every != self.step // config.save_every
        if due or leaves or self.ends or self.step >= config.steps:
            self.save()
        if leaves:
            self._arrive(bar)
            raise KeyboardInterrupt("a signal came to this rank")

    def _send(self, about: dict[str, Any], start: int, began: float) -> bool:
        """Say what this rank has done, and give what it has changed. Returns whether it leaves then."""
        besides = torch.cat([to_bytes(self.second.rows()), to_bytes(torch.stack(self.loads).int())])
        part = self.agreed.encode(self._weights(), self.names) + besides.cpu().numpy().tobytes()
        plan, self.loads = self.plans.pop(0), []
        if self.overlap and not self.plans:  # the first round, before which nothing was decided
            self.plans.append(Verdict([], plan.members, [], plan.steps, end_of(plan, self.config.accumulation)))
        if self.overlap and self.step < self.config.steps:
            about["wall"] = time.monotonic() - began - self.aside
        leaves = about["leaving"] = came() and self.step < self.config.steps
        self.flight = Flight(self.round, start, self.step, self.taking, about, part,
                             self.plans[-1] if self.plans else plan, self._copies(), began)
        self.flight.start(self.members, self.config)
        self.round += 1
        if self.plans:
            self.taking = self.plans[0].members
        return leaves

    def _arrive(self, bar: ProgressBar) -> bool:
        """Take in the round that is under way, if there is one, write what is due and let in who joins. Returns whether
        this rank still takes part."""
        if self.flight is None:
            return True
        flight, self.flight, waits = self.flight, None, time.monotonic()
        verdict, said, parts = flight.found.result()
        began, members = time.monotonic(), self.members
        if flight.part and members.rank not in verdict.merged:  # it came too late
            if flight.about["leaving"]:
                raise KeyboardInterrupt("a signal came to this rank")
            self._join()
            return False
        total = sum(one["tokens"] for one in said.values())
        self._merge(flight, said, parts)
        wall = flight.about.get("wall") or time.monotonic() - flight.began
        self.plans.append(verdict)
        between = len(self.plans) > 1  # another round has begun
        self.taking = [rank for rank in self.plans[0].members
                       if not between or (rank in verdict.members and rank not in verdict.joining)]
        stays = [rank for rank in verdict.members if rank not in verdict.joining]
        self.ends = not stays
        self._lead(members.rank == min([r for r in stays if r in said] or verdict.merged or stays))
        if flight.part:
            self.log.write(record := {
                "step": flight.step, "round": flight.number,
                "loss": sum(one["loss"] * one["tokens"] for one in said.values()) / total,
                **{key: flight.about[key] for key in ("lr", "grad_norm", "max_vio")},
                "tokens_per_second": round(total / wall), "seconds": round(wall, 4), "ranks": verdict.merged,
                "steps": {str(rank): one["steps"] for rank, one in said.items()},
                "efficiency": round(flight.about["seconds"] / wall, 4), "waited": round(began - waits, 3),
                "bytes_sent": members.sent, "bytes_received": members.received})
            if self._told is not None:
                self._told(record)
        if self.ranks.leads:
            state = self._state_of_all(between) if verdict.joining else b""
            for rank in verdict.joining:
                members.admit(rank, self.round + between, state)
        if self.ranks.first:
            every = self.config.eval_every
            if self.ends or flight.step >= self.config.steps or flight.begin // every != flight.step // every:
                with self._as_agreed(flight.step):
                    self._look(self.log, bar)
        members.forget(f"r{flight.number - 2}/")
        self.aside += time.monotonic() - began
        return True

    @torch.no_grad()
    def _merge(self, flight: Flight, said: Mapping[int, dict[str, Any]], parts: Mapping[int, bytes]) -> None:
        """Move what all agree on, and this rank's weights and biases with it."""
        tokens, steps, own = ({rank: one.get(key, ()) for rank, one in said.items()}
                              for key in ("tokens", "steps", "own"))
        rests = self.agreed.merge(parts, tokens, own)
        for name, weight in self._weights().items():
            weight.copy_(self.agreed.theta[name] + (weight - flight.sent[name]))
        self._set_biases(self.biases)
        experts, begin = self.model.config.n_routed_experts, self.second.nbytes
        rows = {rank: of_bytes(tensor_of(rest[:begin], np.uint8), torch.bfloat16).to(self.model.device)
                for rank, rest in rests.items()}
        joined = self.members.rank not in rows
        self.second.merge(rows, tokens, self.second.rows() if joined else rows[self.members.rank])
        loads = [tensor_of(rest[begin:], np.int32).view(steps[rank], -1, experts).to(self.model.device)
                 for rank, rest in rests.items()]
        for step in range(max(steps.values(), default=0)):
            super()._balance(torch.stack([load[step] for load in loads if step < len(load)]).sum(0))
        self.biases = self._biases()
        for load_LE in self.loads:
            super()._balance(load_LE)

    def _numbers(self) -> range:
        plan, rank = self.plans[0], self.members.rank
        parts, place = even(self.config.accumulation, len(plan.members)), plan.members.index(rank)
        before = sum(plan.steps[other] * part for other, part in zip(plan.members[:place], parts, strict=False))
        first = (self.taken if self.config.sites else plan.begin + before) + self.done * parts[place]
        return range(first, first + parts[place])

    def _length(self) -> int:
        """Steps of the schedule in this round."""
        return min(max(self.plans[0].steps.values()), self.config.steps - self.start)

    def _balance(self, load_LE: Tensor) -> None:
        self.loads.append(load_LE)
        super()._balance(load_LE)

    # ---- weights and biases --------------------------------------------------------------------------------------

    def _weights(self) -> dict[str, Tensor]:
        """What is trained, here or elsewhere, as it lies in the model; in the same order on all ranks."""
        parts = {name: p for name, _, p in parts_on(self.model)}
        return {name: p.detach() for name, p in (parts | trained(self.model)).items()}

    def _copies(self) -> dict[str, Tensor]:
        return {name: weight.clone() for name, weight in self._weights().items()}

    def _balanced(self) -> list[Any]:
        return [gate for gate in self.gates if hasattr(gate, "e_score_correction_bias")]

    def _biases(self) -> dict[str, Tensor]:
        return {str(layer): gate.e_score_correction_bias.clone() for layer, gate in enumerate(self._balanced())}

    def _set_biases(self, biases: Mapping[str, Tensor]) -> None:
        for layer, gate in enumerate(self._balanced()):
            gate.e_score_correction_bias.copy_(biases[str(layer)])

    @torch.no_grad()
    def _set_weights(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in self._weights().items():
            weight.copy_(weights[name])

    @contextlib.contextmanager
    def _as_agreed(self, step: int) -> Iterator[None]:
        """The model as all agree on it, at a step; this rank's own weights afterwards."""
        own = self._copies(), self._biases(), self.step
        self._set_weights(self.agreed.theta)
        self._set_biases(self.biases)
        self.step = step
        try:
            yield
        finally:
            self._set_weights(own[0])
            self._set_biases(own[1])
            self.step = own[2]

    # ---- coming and going ----------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Begin with those who agree on the same weights, the furthest; others get them."""
        members, config = self.members, self.config
        members.agree({"tokenizer": self.tokenizer and self.tokenizer.fingerprint, "experts": self.data.experts,
                       **{name: getattr(config, name) for name in SAME}, **self.model.config.to_dict(),
                       "base": self.base})
        if members.there("r-1/verdict"):
            return self._join()
        members.finish(-1, {"key": self._key(), "step": self.step, "begin": self.begin, "own": self.names}, b"")
        present = members.wait(-1, range(members.size))
        said = {rank: members.about(-1, rank) for rank in present}
        base = max(said.values(), key=lambda one: one["step"])
        if config.sites and not members.there("r-1/verdict"):  # else who has decided has seen more
            check_owners(self.data.experts, {rank: one["own"] for rank, one in said.items()}, begun=base["step"] > 0)
        same = [rank for rank in present if said[rank]["key"] == base["key"]]
        every = dict.fromkeys(present, self.length)
        verdict = members.decide(-1, Verdict(same, present, [r for r in present if r not in same], every,
                                             base["begin"]))
        if members.rank not in verdict.merged:
            return self._join()
        self.plans, self.taking = [verdict], verdict.members
        self._lead(members.rank == verdict.merged[0])
        if self.flight is not None:
            self.flight.ranks, self.flight.latest = verdict.merged, verdict
        if self.ranks.leads:
            state = self._state_of_all()
            for rank in verdict.joining:
                members.admit(rank, self.round, state)
        if self.flight is not None:
            self.flight.start(members, self.config)

    def _join(self) -> None:
        """Take what the others have."""
        self.flight = None
        self._lead(False)
        self.round, state = self.members.join(max(PATIENCE, self.config.rank_timeout))
        tensors = load(state)
        about = json.loads(tensors.pop("about").numpy().tobytes())
        self.agreed.load_state_dict(tensors)
        self._set_weights(self.agreed.theta)
        self._set_biases(parts_of(tensors)["bias"])
        self.biases, self.loads, self.step = self._biases(), [], about["step"]
        self.plans = [Verdict.of(to_json(about["plan"]).encode())]
        self.taking = self.plans[0].members
        if (under_way := about["flight"]) is not None:
            self.flight = Flight(**under_way, about={}, part=b"", latest=self.plans[0], sent=self._copies())
            self.flight.start(self.members, self.config)

    def _state_of_all(self, between: bool = False) -> bytes:
        """What a rank that joins needs. between: it begins with the round after this one."""
        flight, end = self.flight, self.start + self._length() if between else self.step
        under_way = {"number": self.round, "begin": self.start, "step": end, "ranks": self.taking} if between else None
        if flight is not None:
            under_way = {"number": flight.number, "begin": flight.begin, "step": flight.step, "ranks": flight.ranks}
        about = {"step": end, "plan": asdict(self.plans[-1]), "flight": under_way}
        return save({**{key: tensor.cpu().contiguous() for key, tensor in self._agreed_on().items()},
                     "about": tensor_of(to_json(about).encode(), np.uint8)})

    def _agreed_on(self) -> dict[str, Tensor]:
        return {**{key: tensor for key, tensor in self.agreed.state_dict().items() if not key.startswith("error.")},
                **{f"bias.{layer}": bias for layer, bias in self.biases.items()}}

    def _key(self) -> str:
        """Of what ranks must have in common to begin together."""
        number = None if self.flight is None else self.flight.number
        key = blake2b(to_json([self.step, self.round, self.begin, number]).encode(), digest_size=16)
        for name, tensor in sorted(self._agreed_on().items()):
            key.update(name.encode() + tensor.contiguous().cpu().numpy().tobytes())
        return key.hexdigest()

    def _lead(self, leads: bool) -> None:
        writes = leads or self.ranks.apart
        if writes and not isinstance(self.log, RunLog):
            # the line of a round that is under way is still to come
            self.log = RunLog(self.out, self.step - (self.flight is not None), self.config.tensorboard)
        elif not writes:
            self.log.close()
            self.log = NoLog()
        self.ranks.leads = leads

    # ---- what only this rank has -----------------------------------------------------------------------------------

    def _write_own(self) -> None:
        moments = {f"inner.{name}.{key}": value for name, state in self._optimizer_state()
                   for key, value in state.items() if isinstance(value, Tensor)}
        about: dict[str, Any] = {"round": self.round, "begin": self.plans[0].begin, "speed": self.speed,
                                 "taken": self.taken}
        under_way: dict[str, Tensor] = {}
        if (flight := self.flight) is not None:  # then its weights are not those of the checkpoint
            about["flight"] = to_json({"number": flight.number, "begin": flight.begin, "step": flight.step,
                                       "ranks": [], "about": flight.about | {"leaving": False}})
            under_way = {"part": tensor_of(flight.part, np.uint8), **self._agreed_on(),
                         **{f"own.{name}": weight for name, weight in self._weights().items()},
                         **{f"own_bias.{layer}": bias for layer, bias in self._biases().items()}}
        kept = {key: tensor for key, tensor in self.agreed.state_dict().items() if not key.startswith("theta.")}
        copied = copies(tensors := moments | kept | under_way)
        self.saving.start(partial(write_own, self.out, self.members.rank, self.step, copied or tensors, about),
                          behind=copied is not None)

    def _read_own(self) -> None:
        """Of the checkpoint that the run goes on from; a rank without one begins with moments and errors of zero."""
        if (found := read_own(self.out, self.members.rank, self.step)) is None:
            self.optimizer.state.clear()  # the checkpoint's are those of another rank
            return
        tensors, about = found
        self.round, self.begin, self.speed = int(about["round"]), int(about["begin"]), float(about["speed"])
        self.taken = int(about.get("taken", 0))
        parts = parts_of(tensors)
        parameters = trained(self.model)
        for place, tensor in parts["inner"].items():
            name, _, key = place.rpartition(".")
            self.optimizer.state[parameters[name]][key] = tensor
        self.agreed.load_state_dict(tensors)
        if "flight" in about:
            self._set_weights(parts["own"])
            self._set_biases(parts["bias"])
            self.biases = self._biases()
            self._set_biases(parts["own_bias"])
            self.flight = Flight(**json.loads(about["flight"]), part=tensors["part"].numpy().tobytes(),
                                 latest=Verdict([], [], [], {}, 0), sent=self._copies())
