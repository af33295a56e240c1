"""The settings of a training run, declared as in ../settings.py. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from ..data.mapping import RecordMap
from ..errors import ConfigError
from ..settings import COUNT, NATURAL, NOT_NEGATIVE, POSITIVE, SHARE, UP_TO_ONE, Device, Option, Settings

Compress = Literal["none", "bf16", "int8", "powersgd", "local", "sparse"]
STORE = "DEEPSEEK_STORE"  # environment: HOST:PORT of the store of a run in rounds
Precision = Literal["auto", "fp32", "bf16"]
Algorithm = Literal["adamw", "muon"]
Moments = Literal["fp32", "8bit"]
Activations = Literal["plain", "fp8"]
Weights = Literal["fp32", "bf16"]

# settings that have a meaning only with certain values of another, and their defaults then
_ROUNDS = {"inner_steps": 10, "overlap_steps": 0, "error_decay": 0.95, "sites": False}
ONLY_WITH: dict[str, dict[str, dict[str, Any]]] = {
    "optimizer": {"muon": {"momentum": 0.95}},
    "compress": {"powersgd": {"powersgd_rank": 4},
                 "local": _ROUNDS | {"outer_lr": 0.8, "outer_momentum": 0.5},  # MuLoCo has 0.9, for far longer runs
                 "sparse": _ROUNDS | {"outer_lr": 1.0, "outer_momentum": 0.0}}}  # of SparseLoCo
IN_ROUNDS = ("local", "sparse")
LAYOUT = frozenset(("expert_parallel", "fsdp", "place_every"))  # which rank has what: a run may continue with another

# settings of a leg of the learning rate's schedule; `warmup` is tuning's
SCHEDULE = frozenset(("steps", "lr", "min_lr_ratio", "warmup_steps", "warmup"))


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """Defaults follow DeepSeek-V3 (arXiv 2412.19437, section 4.2) where they carry over to small models: betas, decay,
    clipping, bias speed, MTP weight, balance weight. Raises ConfigError naming setting, rule and value."""

    steps: Annotated[int, Option("optimizer steps", COUNT)] = 1000
    batch_size: Annotated[int, Option("sequences a batch", COUNT)] = 16
    seq_len: Annotated[int, Option("tokens a sequence", COUNT)] = 256
    accumulation: Annotated[int, Option("batches summed into one step", COUNT)] = 1
    lr: Annotated[float, Option(
        "highest learning rate; 1e-3, or 1e-4 where training starts from a checkpoint",
        POSITIVE)] = None  # type: ignore[assignment]
    min_lr_ratio: Annotated[float, Option("last learning rate as a share of it", NOT_NEGATIVE)] = 0.1
    warmup_steps: Annotated[int, Option("steps of linear warm-up", NATURAL)] = 50
    optimizer: Annotated[Algorithm, Option(
        "muon: Muon for matrices, each expert's its own, AdamW for embeddings, head, gates and norms")] = "adamw"
    moments: Annotated[Moments, Option(
        "how the optimizer keeps them; 8bit by blocks of 256, those of less than 4096 weights stay FP32")] = "fp32"
    weights: Annotated[Weights, Option(
        "bf16: matrices and their gradients in BF16, each step rounded up or down by chance; needs moments = 8bit")
    ] = "fp32"
    momentum: Annotated[float | None, Option("Muon's momentum; 0.95", SHARE)] = None
    beta1: Annotated[float, Option("AdamW's first beta", SHARE)] = 0.9
    beta2: Annotated[float, Option("AdamW's second beta", SHARE)] = 0.95
    weight_decay: Annotated[float, Option("decay of matrices", NOT_NEGATIVE)] = 0.1
    clip: Annotated[float, Option("largest norm of the gradient", POSITIVE)] = 1.0
    precision: Annotated[Precision, Option(
        "of activations; auto is BF16 where that is faster")] = "auto"
    mtp_weight: Annotated[float, Option("weight of the multi-token prediction loss", NOT_NEGATIVE)] = 0.3
    balance_weight: Annotated[float, Option("weight of the sequence-wise balance loss", NOT_NEGATIVE)] = 1e-4
    bias_speed: Annotated[float, Option("speed of the gate-bias balancing", NOT_NEGATIVE)] = 1e-3
    guide_weight: Annotated[float, Option(
        "weight of the loss that guides labelled text to its expert's routing group", NOT_NEGATIVE)] = 0.1
    activations: Annotated[Activations, Option(
        "how what a layer computes waits for the backward pass; fp8: in e4m3, each row with a scale")] = "plain"
    gradient_checkpointing: Annotated[bool, Option(
        "recompute layers in the backward pass: less memory, more time")] = False
    eval_every: Annotated[int, Option("steps between evaluations", COUNT)] = 100
    eval_batches: Annotated[int, Option("batches per evaluation", COUNT)] = 16
    save_every: Annotated[int, Option("steps between checkpoints", COUNT)] = 200
    compress: Annotated[Compress, Option(
        "what ranks send: gradients in FP32 (none), in BF16, in 8 bits or as factors of low rank (powersgd); or, after "
        "some steps of their own, what these changed: in 2 bits (local), or the largest 64 of each 4,096 values "
        "(sparse)")] = "none"
    expert_parallel: Annotated[int, Option(
        "ranks that share one set of routed experts, each with its own part (compress = none)", COUNT)] = 1
    fsdp: Annotated[bool, Option(
        "divide weights, gradients and moments over the ranks, and gather a layer's weights while it computes (FSDP2; "
        "compress = none; FP32 weights and moments)")] = False
    place_every: Annotated[int, Option(
        "steps after which experts go to other ranks by their loads, with their moments (expert_parallel); 0: never",
        NATURAL)] = 0
    powersgd_rank: Annotated[int | None, Option("columns of PowerSGD's factors; 4", COUNT)] = None
    inner_steps: Annotated[int | None, Option("steps between two merges (local, sparse); 10", COUNT)] = None
    overlap_steps: Annotated[int | None, Option(
        "steps of a round that ranks take while the merge of the one before is under way, before they wait for it "
        "(local, sparse); 0, which is none", NATURAL)] = None
    outer_lr: Annotated[float | None, Option(
        "learning rate of a merge; 0.8 (local) or 1 (sparse, sites)", POSITIVE)] = None
    outer_momentum: Annotated[float | None, Option(
        "Nesterov momentum of a merge; 0.5 (local) or 0 (sparse, sites)", SHARE)] = None
    error_decay: Annotated[float | None, Option(
        "share of what coding has lost that is made up for in the next merge (local, sparse); 0.95",
        UP_TO_ONE)] = None
    sites: Annotated[bool | None, Option(
        "each rank has text of some of the names, in a folder of its own, and trains and sends their experts alone and "
        "what is no routed expert; --experts NAME, without a path, for those of others (local, sparse)")] = None
    balance: Annotated[bool, Option(
        "give slow ranks fewer of a step's batches, or fewer steps in a round (local, sparse), by measured speeds, "
        "but not with expert_parallel or fsdp; without it the bits of a run do not depend on clocks")] = True
    rank_timeout: Annotated[float, Option("seconds that ranks wait for another", POSITIVE)] = 600.0
    keep: Annotated[int, Option("checkpoints kept", COUNT)] = 2
    seed: Annotated[int, Option("seed of weights and data order", NATURAL)] = 0
    tensorboard: Annotated[bool, Option("write TensorBoard events")] = False

    def __post_init__(self) -> None:
        if self.lr is None:
            object.__setattr__(self, "lr", 1e-3)
        super().__post_init__()
        if self.weights == "bf16" and self.moments != "8bit":
            raise ConfigError(f"weights = 'bf16': goes with moments = '8bit', not with moments = {self.moments!r}")
        if self.weights == "bf16" and self.compress in IN_ROUNDS:
            raise ConfigError(f"weights = 'bf16': does not go with compress = {self.compress!r} (FP32 merges)")
        if self.weights == "bf16" and self.expert_parallel > 1:
            raise ConfigError("weights = 'bf16': does not go with expert_parallel, whose experts stay FP32")
        if self.activations == "fp8" and self.gradient_checkpointing:
            raise ConfigError("activations = 'fp8': has no meaning with gradient_checkpointing, which keeps none")
        for name, default in (("outer_lr", 1.0), ("outer_momentum", 0.0)):  # momentum upsets gates that sites share
            if self.sites and self.compress in IN_ROUNDS and getattr(self, name) is None:
                object.__setattr__(self, name, default)
        for setting, values in ONLY_WITH.items():
            for name, default in only_with(setting, getattr(self, setting)).items():
                if (value := getattr(self, name)) is None:
                    object.__setattr__(self, name, default)
                elif default is None:
                    known = " or ".join(one for one, names in values.items() if name in names)
                    raise ConfigError(f"{name} = {value}: has a meaning only with {setting} = {known}")
        if self.expert_parallel > 1 and self.compress != "none":
            raise ConfigError(f"expert_parallel = {self.expert_parallel}: goes only with compress = none, this is "
                              f"{self.compress}")
        for name, usual in (("compress", "none"), ("expert_parallel", 1), ("weights", "fp32"), ("moments", "fp32"),
                            ("activations", "plain")):
            if self.fsdp and (value := getattr(self, name)) != usual:
                raise ConfigError(f"fsdp = True: goes only with {name} = {usual}, this is {value}")
        if self.place_every and self.expert_parallel == 1:
            raise ConfigError(f"place_every = {self.place_every}: has a meaning only with expert_parallel")
        if (self.overlap_steps or 0) > (self.inner_steps or 0):
            raise ConfigError(f"overlap_steps = {self.overlap_steps}: must be at most inner_steps "
                              f"({self.inner_steps}), as a merge is over before the next one begins")


def only_with(setting: str, value: Any) -> dict[str, Any]:
    """Defaults of all settings that depend on `setting`; None of those that have no meaning where it is `value`."""
    values = ONLY_WITH[setting]
    return {**dict.fromkeys(sorted({name for one in values.values() for name in one})), **values.get(value, {})}


@dataclass(frozen=True, kw_only=True)
class RunConfig(TrainConfig):
    """Where a run begins, and on what."""

    from_model: Annotated[str | Path | None, Option(
        "a checkpoint folder or a hub id: starts from its weights, with its configuration, tokenizer and names; all "
        "parameters are trained", metavar="MODEL", flag="from")] = None
    tokenizer: Annotated[str | Path | None, Option(
        "folder of a tokenizer; else one is trained on the data", metavar="DIR")] = None
    map: RecordMap | Mapping[str, Any] | str | Path | None = None
    valid_fraction: Annotated[float, Option("share of the documents held out", (
        "must be at least 0 and below 1", SHARE[1]))] = 0.01
    device: Annotated[Device, Option("where the model runs")] = "cpu"


def quantity(value: Any, units: Mapping[str, float]) -> float | None:
    """A positive number with one of the units, in that of 1; None where it is none."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-zµ/]+)\s*", value) if isinstance(value, str) else None
    unit = found and units.get(found[2])
    return float(found[1]) * unit if found and unit and float(found[1]) > 0 else None


PREFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}
BANDWIDTH = {f"{prefix}{unit}": factor * size for unit, size in (
    ("bit", 1 / 8), ("bit/s", 1 / 8), ("bps", 1 / 8), ("B", 1.0), ("B/s", 1.0))
    for prefix, factor in PREFIXES.items()} | {"mbit": 1e6 / 8, "gbit": 1e9 / 8}  # bytes a second; the last as tc does
LATENCY = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}  # seconds


@dataclass(frozen=True)
class Line(Settings):
    """What joins the machines of a run."""

    bandwidth: Annotated[str, Option("of each machine's line, either way, for --predict", (
        "must be a positive number with a unit: bit, kbit, Mbit, Gbit a second, or B, kB, MB, GB",
        lambda v: quantity(v, BANDWIDTH) is not None), "100Mbit")] = "1Gbit"
    latency: Annotated[str, Option("of a message, one way, for --predict", (
        "must be a positive number with a unit: s, ms or us", lambda v: quantity(v, LATENCY) is not None),
        "20ms")] = "1ms"

    def seconds(self, hops: int, size: float) -> float:
        """Of so many messages one after another, with `size` bytes in all."""
        bandwidth, latency = quantity(self.bandwidth, BANDWIDTH), quantity(self.latency, LATENCY)
        assert bandwidth is not None and latency is not None
        return hops * latency + size / bandwidth


@dataclass(frozen=True)
class Leg:
    """A stretch of a run, up to step `steps`, with a warm-up and a cosine of its own. A run has one; every extension by
    more steps adds one."""

    steps: int
    lr: float
    min_lr_ratio: float
    warmup_steps: int

    @classmethod
    def of(cls, config: TrainConfig) -> Leg:
        return cls(config.steps, config.lr, config.min_lr_ratio, config.warmup_steps)


def learning_rate(legs: Sequence[Leg], step: int) -> float:
    """Of a leg: linear warm-up from the last rate of the leg before (0 in the first), then a cosine down to
    min_lr_ratio * lr at its last step."""
    begin, base = 0, 0.0
    for leg in legs:
        if step < leg.steps or leg is legs[-1]:
            break
        begin, base = leg.steps, leg.min_lr_ratio * leg.lr
    if (taken := step - begin) < leg.warmup_steps:
        return base + (leg.lr - base) * (taken + 1) / leg.warmup_steps
    done = (taken - leg.warmup_steps) / max(1, leg.steps - begin - leg.warmup_steps)
    return leg.lr * (leg.min_lr_ratio + (1 - leg.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(done, 1))))
