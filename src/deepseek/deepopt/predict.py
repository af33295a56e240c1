"""What a run on several machines would cost, without training: `deepseek train … --predict N`.

Timed on this machine: a few batches of random tokens through the model, forward and backward; the optimizer's step;
what coding takes. For ranks in step that is their own sum of gradients (gradients.py) among ranks that are not there,
which counts bytes as it does in training; for rounds it is the codec on every weight.

    a step   = batches of the busiest rank * seconds of one + optimizer + coding + line
    line     = hops * latency + bytes sent / bandwidth         2 (N - 1) hops of an all-reduce around a ring
    a round  = inner_steps steps + coding + line               N (N - 1) parts through the line of the rank with the
                                                               store: each is put there once and fetched N - 1 times

Each rank is taken to be a machine like this one, its line as fast both ways at once, and nothing to be lost on it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from ..errors import ConfigError
from ..model import CausalLM
from ..ops.saved import Saver
from .compress import CODECS, ErrorFeedback, OuterNesterov
from .device import compute_dtype
from .gradients import gradient_sum
from .members import PIECE, POLL
from .optimizers import make_optimizer, narrow, trained
from .ranks import Group, Ranks, buckets, even, fused, ring_bytes
from .second_moments import SecondMoments
from .settings import IN_ROUNDS, ONLY_WITH, Compress, Line, TrainConfig

RUNS = 3  # timed of everything, after one that is not
MIB = 2**20


class Calibration(NamedTuple):
    """Of this machine. Seconds of a batch and of the optimizer; bytes of a rank's weights, gradients, moments and of
    what a forward pass keeps; loads: how many numbers the gates count."""

    batch: float
    optimizer: float
    weights: int
    gradients: int
    moments: int
    activations: int
    loads: int


class Mode(NamedTuple):
    """One row. seconds: of a step; alone: of one process; coding, line: of them; sent, received: bytes of a rank a
    step; state: bytes that it keeps for coding."""

    compress: Compress
    seconds: float
    alone: float
    coding: float
    line: float
    sent: float
    received: float
    state: int

    @property
    def efficiency(self) -> float:
        """Share of the time that is neither coding nor sending."""
        return 1 - (self.coding + self.line) / self.seconds


@dataclass(frozen=True)
class Prediction:
    """What `ranks` machines would need for the steps of `config`."""

    ranks: int
    line: Line
    config: TrainConfig
    calibration: Calibration
    modes: tuple[Mode, ...]

    def table(self) -> str:
        """For people."""
        found, config = self.calibration, self.config
        rows = [("compress", "s a step", "of one process", "efficiency", "MB a step sent", "received", "coding s",
                 "line s", "MiB for coding")]
        rows += [(mode.compress + (f", {inner_steps(config, mode.compress)} steps a round" if mode.compress in IN_ROUNDS
                                   else ""),
                  f"{mode.seconds:.3f}", f"{mode.alone / mode.seconds:.2f} x", f"{mode.efficiency:.1%}",
                  f"{mode.sent / 1e6:,.3f}", f"{mode.received / 1e6:,.3f}", f"{mode.coding:.3f}", f"{mode.line:.3f}",
                  f"{mode.state / MIB:,.1f}") for mode in self.modes]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join([
            f"PREDICTION, nothing is trained: {self.ranks} ranks, each a machine like this one "
            f"({torch.get_num_threads()} threads), on lines of {self.line.bandwidth} with {self.line.latency} one way",
            f"timed here on random tokens: {found.batch:.3f} s a batch of {config.batch_size} x {config.seq_len}, "
            f"{found.optimizer:.3f} s the optimizer; one process takes "
            f"{config.accumulation * found.batch + found.optimizer:.3f} s a step of {config.accumulation} batches",
            "memory of a rank, MiB: " + ", ".join(
                f"{name} {size / MIB:,.1f}" for name, size in zip(
                    ("weights", "gradients", "moments", "activations"), found[2:6], strict=True)),
            "", *("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)])


class Rehearsal(Ranks):
    """Ranks that are not there: counts what this one would send, and gives it back its own. hops: messages that come
    one after another."""

    def __init__(self, size: int) -> None:
        super().__init__(0, size)
        self.hops = 0

    def sum_(self, tensors: Sequence[Tensor], group: Group | None = None) -> None:
        for bucket in buckets(tensors):
            flat = fused(bucket)
            self.sent += ring_bytes(flat.numel() * flat.element_size(), self.size)
            for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))
        self.hops += 2 * (self.size - 1)

    def exchange(self, payloads: Sequence[Tensor]) -> list[Tensor]:
        self.sent += sum(len(payload) for payload in payloads[1:])
        self.hops += 1
        return [payloads[0]] * self.size

    def all(self, payload: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        self.sent += max(sizes) * (self.size - 1)
        self.hops += self.size - 1
        return [payload[:size] for size in sizes]  # the first rank's is the longest


def predict(model: CausalLM, config: TrainConfig, ranks: int, line: Line) -> Prediction:
    """Predict a step for every `compress`. The model is spoilt by it. Raises ConfigError where there are fewer batches
    than ranks."""
    if config.accumulation < ranks:
        raise ConfigError(f"accumulation = {config.accumulation}: must be at least the number of ranks ({ranks}): the "
                          "batches of a step are divided among them")
    found = calibrate(model, config)
    return Prediction(ranks, line, config, found, tuple(
        (_in_rounds if mode in IN_ROUNDS else _in_step)(model, as_mode(config, mode), ranks, line, found)
        for mode in get_args(Compress) if config.weights == "fp32" or mode not in IN_ROUNDS))


def calibrate(model: CausalLM, config: TrainConfig) -> Calibration:
    """Time batches and the optimizer; gradients stay in the model."""
    model.train()
    model.compute_dtype, model.gradient_checkpointing = compute_dtype(config, model), config.gradient_checkpointing
    draw = torch.Generator().manual_seed(config.seed)
    ids_BT = torch.randint(model.config.vocab_size, (config.batch_size, config.seq_len + 1), generator=draw)
    ids_BT, labels_BT = ids_BT[:, :-1].to(model.device), ids_BT[:, 1:].to(model.device)
    if config.weights == "bf16":
        narrow(model)
    loads, parameters = 0, trained(model)

    def batch() -> None:
        nonlocal loads
        result = model.loss(ids_BT, labels_BT, mtp_weight=config.mtp_weight, balance_weight=config.balance_weight)
        result.total.backward()
        result.main.item()  # a GPU has done all of it then
        loads = result.load_LE.numel()

    kept = _saved(batch, parameters.values())
    if config.activations == "fp8":  # whose hooks come before the counting ones inside layers
        model.saver = Saver()
        exact = _saved(batch, parameters.values())
        kept = exact + (kept - exact) // model.compute_dtype.itemsize
    seconds = timed(batch)
    optimizer = make_optimizer(model, config)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), config.clip).item()
        optimizer.step()
        next(iter(parameters.values())).sum().item()

    step()  # which makes the moments
    weights = [*model.parameters(), *model.buffers()]
    moments = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return Calibration(seconds, timed(step), nbytes(weights), nbytes(parameters.values()), nbytes(moments), kept,
                       loads)


def _in_step(model: CausalLM, config: TrainConfig, size: int, line: Line, found: Calibration) -> Mode:
    ranks = Rehearsal(size)
    gradients = gradient_sum(config, ranks)
    parameters = {name: p.grad.clone() for name, p in trained(model).items() if p.grad is not None}
    extra = torch.zeros(4 + size + found.loads, device=model.device)  # as of loop.py: losses, seconds, loads

    def exchange() -> None:
        gradients.sum_(parameters, extra)
        extra[0].item()

    exchange()  # which makes the state
    sent, wire = ranks.sent, line.seconds(ranks.hops, ranks.sent)
    coding = timed(exchange)
    computing = max(even(config.accumulation, size)) * found.batch + found.optimizer
    return Mode(config.compress, computing + coding + wire, config.accumulation * found.batch + found.optimizer, coding,
                wire, sent, sent, nbytes(gradients.state_dict().values()))


def _in_rounds(model: CausalLM, config: TrainConfig, size: int, line: Line, found: Calibration) -> Mode:
    length, lr, momentum, decay = (config.inner_steps, config.outer_lr, config.outer_momentum, config.error_decay)
    assert length is not None and lr is not None and momentum is not None and decay is not None
    codec = CODECS["2bit" if config.compress == "local" else "sparse"]
    feedback, outer = ErrorFeedback(codec, decay), OuterNesterov(lr, momentum)
    weights = {name: p.detach().clone() for name, p in trained(model).items()}
    change = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trained(model).items()}
    merged = {name: torch.zeros_like(p) for name, p in weights.items()}
    payloads: dict[str, Tensor] = {}

    def encode() -> None:
        payloads.update((name, feedback.encode(name, value)) for name, value in change.items())

    def decode() -> None:
        for name, payload in payloads.items():
            codec.add(payload, merged[name].shape, 1 / size, merged[name])
        next(iter(merged.values())).sum().item()

    def merge() -> None:
        outer.step(weights, merged)
        next(iter(weights.values())).sum().item()

    for work in (encode, merge):  # which makes the state
        work()
    coding = timed(encode) + size * timed(decode) + timed(merge)
    part = sum(codec.nbytes(tuple(p.shape)) for p in change.values()) + 4 * found.loads * length
    part += SecondMoments(make_optimizer(model, config), trained(model).values()).nbytes
    # looks whether the others are there, the verdict, what each says, its part; every answer takes two hops
    answers = 1 + size + 1 + 3 * size + (size - 1) * (2 + -(-part // PIECE))
    wire = line.seconds(2 * answers, size * (size - 1) * part) + POLL / 2
    computing = max(even(config.accumulation, size)) * found.batch + found.optimizer
    waits = max(0.0, wire - (config.overlap_steps or 0) * computing)
    state = nbytes([*weights.values(), *feedback.state_dict().values(), *outer.state_dict().values()])
    return Mode(config.compress, computing + (coding + waits) / length,
                config.accumulation * found.batch + found.optimizer, coding / length, wire / length, part / length,
                (size - 1) * part / length, state)


def _saved(batch: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Bytes that a batch keeps for its backward pass."""
    kept = _Kept(parameters)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        batch()
    return kept.size


class _Kept:
    """Counts what a forward pass keeps for the backward pass, less the parameters."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.size, self._seen = 0, {p.untyped_storage().data_ptr() for p in parameters}
        self.alive: list[Tensor] = []  # no other tensor gets the place of one that was counted

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.alive.append(tensor)
            self.size += storage.nbytes()
        return tensor


def as_mode(config: TrainConfig, compress: Compress) -> TrainConfig:
    """The same run with another `compress`; what that needs has its default, or what the run itself says."""
    said = {name: getattr(config, name) for names in ONLY_WITH["compress"].values() for name in names}
    if compress != config.compress:
        both = compress in IN_ROUNDS and config.compress in IN_ROUNDS
        said = dict.fromkeys(said) | ({"inner_steps": config.inner_steps} if both else {})
    return replace(config, compress=compress, **said)


def inner_steps(config: TrainConfig, compress: Compress) -> int | None:
    return as_mode(config, compress).inner_steps


def timed(work: Callable[[], object]) -> float:
    """Seconds, the median of a few runs."""
    found = []
    for _ in range(RUNS):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
