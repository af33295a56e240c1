"""Trainer: training from text to checkpoint, as `deepseek train` runs it.

    1. start      a configuration (from scratch), or a checkpoint (`from_model`): its weights, configuration, tokenizer
                  and names
    2. tokenizer  the checkpoint's, the one given, or one trained on the data; kept in OUT/tokenizer
    3. shards     the data, packed into OUT/tokens
    4. steps      loop.py
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..atlas import Atlas
from ..atlas.atlas import FILE
from ..checkpoint import find_config, fingerprint, load_model, open_checkpoint, resolve, stored_dtype, tensor_hashes
from ..checkpoint.ready import plain
from ..config import ModelConfig
from ..data import ReadReport, RecordMap, TokenShards, list_files, pack_cached, read_documents
from ..data.settings import check_names
from ..errors import ConfigError
from ..files import locked, replace_folder
from ..interrupts import handled, kept
from ..memory import check_memory
from ..model import CausalLM
from ..progress import ProgressBar
from ..settings import Device
from ..tokenizer import Tokenizer
from .expert_parallel import ExpertParallelLoop, check_layout
from .loop import TrainingLoop
from .members import Members, Solo
from .predict import Prediction, predict
from .ranks import Ranks
from .rounds import RoundLoop
from .run_folder import checkpoints, kept_in, run_in, step_of
from .settings import IN_ROUNDS, STORE, Line, RunConfig, TrainConfig
from .shares import check_even

Paths = str | Path | Sequence[str | Path]
CONTINUED_LR = 1e-4  # where training starts from a checkpoint


@dataclass(frozen=True, repr=False)
class Trainer(RunConfig):
    """Trains a model on text, from scratch or from a checkpoint, and continues a run that was stopped.

        model = Trainer("nano", out="runs/notes", steps=300).fit("notes/")
        model = Trainer(from_model=model, out="runs/law").fit({"law_expert": "data/law", "": "data/rest"})
        model = Trainer.resume("runs/law", steps=2000).fit()

    config: a preset, a config.json, a checkpoint folder or hub id whose configuration is taken, or a ModelConfig.
    from_model: a checkpoint whose weights, configuration, tokenizer and names are taken. out: folder of the run.
    tokenizer: a folder; else one is trained on the data. map: which columns of records are what (a RecordMap, its
    keys, or a YAML file), where their names do not say it. All other settings: TrainConfig. Raises ConfigError naming
    setting, rule and value.
    """

    config: str | Path | ModelConfig | None = None
    out: str | Path = field(kw_only=True)

    def __post_init__(self) -> None:
        if self.lr is None and self.from_model is not None:
            object.__setattr__(self, "lr", CONTINUED_LR)
        super().__post_init__()
        object.__setattr__(self, "map", RecordMap.of(self.map))
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device = 'cuda': this torch finds no GPU")
        if self.config is not None and self.from_model is not None:
            raise ConfigError(f"config = {str(self.config)!r}: does not go with from_model ({self.from_model}), which "
                              "brings its own configuration")
        if self.config is None and self.from_model is None and run_in(Path(self.out)) is None:
            raise ConfigError(f"config and from_model: one of them must be given, as {self.out} holds no run to go on "
                              "with")

    @classmethod
    def resume(cls, out: str | Path, *, steps: int | None = None, lr: float | None = None,
               min_lr_ratio: float | None = None, warmup_steps: int | None = None, device: Device = "cpu") -> Trainer:
        """The run in `out` as it was started; `fit()` takes the steps that are left. steps: more of them extend the
        run by a leg of the schedule with its own warm-up and cosine (and lr, min_lr_ratio, warmup_steps, if given)."""
        if (run := run_in(Path(out))) is None:
            raise ConfigError(f"out = {out}: holds no run to go on with")
        given = {"steps": steps, "lr": lr, "min_lr_ratio": min_lr_ratio, "warmup_steps": warmup_steps}
        return cls(out=out, device=device, valid_fraction=run.get("about", {}).get("valid_fraction", 0.01),
                   **run["train"] | {key: value for key, value in given.items() if value is not None})

    def __repr__(self) -> str:
        out, run = Path(self.out), run_in(Path(self.out))
        start = self.config if self.from_model is None else f"from {self.from_model}"
        if isinstance(start, ModelConfig):
            start = f"a {start.model_type} of {start.num_hidden_layers} layers x {start.n_routed_experts} experts"
        found = checkpoints(out)
        state = ("nothing is trained yet" if not found else f"finished: {out / 'model'}"
                 if step_of(found[-1]) == self.steps and (out / "model").is_dir() else
                 f"step {step_of(found[-1])} is saved")
        return (f"Trainer: {start or 'continues the run'}{' from scratch' if self.config is not None else ''}, in "
                f"{out}: {self.steps:,} steps of {self.batch_size * self.accumulation} x {self.seq_len} tokens, lr "
                f"{self.lr:g}, {self.precision}, {self.device}; "
                + (state if run is not None else "nothing is trained yet"))

    # ---- the run ------------------------------------------------------------------------------------------------

    def fit(self, data: Paths | Mapping[str, Paths] | None = None, *,
            on_step: Callable[[dict[str, Any]], None] | None = None) -> Path:
        """Train on `data`; returns OUT/model, a checkpoint.

        data: text, code, JSON lines or folders of them, or {expert name: its text}, which binds the routing groups to
        the names in this order ("" is text without a name; with `sites`, [] is a name of which others have text); None
        continues with the data of the run in `out`. on_step:
        told of every step, as log.jsonl is. Raises ConfigError when `out` holds a run with other settings or data,
        and what reading, packing and loading raise, before any step.

        Ctrl-C and SIGTERM: the step is finished and saved, then KeyboardInterrupt is raised; the same call goes on.
        """
        out = Path(self.out)
        ranks = self._ranks()
        with (locked(out) if ranks.number == 0 or self.sites else nullcontext(), handled(), kept(lambda: kept_in(out)),
              nullcontext() if ranks.first else redirect_stdout(None)):
            return self._fit(data, on_step, ranks)

    train = fit

    def predict(self, ranks: int, *, bandwidth: str = "1Gbit", latency: str = "1ms") -> Prediction:
        """Predict what a step would take on so many machines like this one, joined by such lines (`Line`), for each
        way of sending. Times a few batches of random tokens; trains nothing, reads no data and writes nothing."""
        if self.expert_parallel > 1:
            raise ConfigError(f"expert_parallel = {self.expert_parallel}: what is predicted is data parallel (1)")
        if self.fsdp:
            raise ConfigError("fsdp = True: what is predicted is data parallel; leave it out")
        if self.sites:
            raise ConfigError("sites = True: what is predicted are ranks that train all experts; leave it out")
        line, run = Line(bandwidth, latency), run_in(Path(self.out))
        start = self._start(run)
        self._check_memory(start.config)
        return predict(self._model(start, start.config, run)[0], TrainConfig(**self._settings()), ranks, line)

    def _fit(self, data: Paths | Mapping[str, Paths] | None, on_step: Callable[[dict[str, Any]], None] | None,
             ranks: Ranks) -> Path:
        out, places = Path(self.out), _by_name(data, bool(self.sites))
        run = run_in(out)
        if places is None and run is None:
            raise ConfigError(f"data: must be given, as {out} holds no run to go on with")
        if places is None and self.map is not None:
            raise ConfigError("map: has a meaning only with data")
        for source in (source for each in (places or {}).values() for source in each):
            if out.resolve().is_relative_to(Path(source).resolve()):
                raise ConfigError(f"out = {out}: must not lie inside DATA ({source}), or the run would read its own "
                                  "logs")
        start = self._start(run)
        config, names = start.config, _names_of(start, places)
        if self.sites and places is not None:
            if not names:
                raise ConfigError("sites = True: has a meaning only where text has names (--experts NAME=PATH)")
            places = {name: paths for name, paths in places.items() if paths}
        _warn_of_doubles(places or {})  # which looks at all paths: a wrong one is said before anything is made
        if self.seq_len > config.max_position_embeddings:
            warnings.warn(f"seq_len = {self.seq_len}: the model's positions end at {config.max_position_embeddings} "
                          "(max_position_embeddings): what it learns beyond them is used nowhere", stacklevel=4)
        if self.expert_parallel > 1:
            check_layout(config, self, ranks.size)
        if self.fsdp:
            check_even(self, ranks.size)
        self._check_memory(config)
        with ranks.first_here():
            tokenizer = self._tokenizer(start, places)
        if self.config is not None:
            config = config.with_(bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_ids or None,
                                  pad_token_id=tokenizer.pad_id)
        with ranks.first_here():
            shards = self._shards(places, names, tokenizer, run)
        ranks.same("data", shards.fingerprint)
        shards.windows(self.seq_len)  # too little data is said before the folder is this run's
        torch.manual_seed(self.seed)
        model, settings = self._model(start, config, run)
        size = sum(p.numel() for p in model.parameters())
        if start.atlas is not None and run is None and ranks.local_first:
            start.atlas.save(out / FILE)  # a run continues without its base
        loop = (partial(RoundLoop, ranks=ranks) if isinstance(ranks, Solo) else partial(
            loop_in_step(self), ranks=ranks))(
            model, shards, TrainConfig(**self._settings()), out, tokenizer, settings=settings, atlas=start.atlas,
            dtype=start.dtype, about=run["about"] if run else {
                "config": None if self.config is None else str(self.config), "valid_fraction": self.valid_fraction,
                "from_model": None if self.from_model is None else str(resolve(self.from_model).absolute()),
                "dtype": str(start.dtype).removeprefix("torch.")})
        per_step = self.batch_size * self.accumulation * self.seq_len
        if isinstance(ranks, Solo) and self.sites:
            per_step //= ranks.members.size
        print(f"{size / 1e6:.1f} M parameters, {shards.train_tokens:,} tokens "
              f"({self.steps * per_step / shards.train_tokens:.2f} epochs), "
              f"{str(model.compute_dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads, lr {self.lr:g}"
              + (f", {ranks.size} ranks, compress = {self.compress}" if ranks.size > 1 else "")
              + (f", expert_parallel = {self.expert_parallel}" if self.expert_parallel > 1 else "")
              + (", fsdp" if self.fsdp else "")
              + (f", own names: {', '.join(shards.present) or 'none'}" if self.sites else "")
              + (f"; continuing after step {loop.step}" if loop.step else ""), flush=True)
        if len(loop.legs) > 1 and loop.step < self.steps:
            before = loop.legs[-2]
            print(f"extended from {before.steps} to {self.steps} steps: lr from {before.lr * before.min_lr_ratio:g} up "
                  f"to {self.lr:g} in {self.warmup_steps} steps, then down to {self.lr * self.min_lr_ratio:g}",
                  flush=True)
        began = loop.legs[-2].steps if len(loop.legs) > 1 else 0
        if loop.step < self.steps <= began + self.warmup_steps:
            print(f"warmup_steps = {self.warmup_steps}: all {self.steps - began} steps are warm-up, so the learning "
                  "rate only rises", flush=True)
        loop.run(on_step)
        return out / "model"

    def _check_memory(self, config: ModelConfig) -> None:
        if self.device == "cpu":
            whole = CausalLM.on_meta(config)
            numbers = sum(p.numel() for p in whole.parameters())
            routed = sum(p.numel() for block in whole.moe_blocks().values() for p in block.experts.parameters())
            here = numbers - routed + routed // self.expert_parallel
            if self.fsdp:
                here //= int(os.environ.get("WORLD_SIZE", "1"))
            each = {"fp32": 8, "bf16": 4}[self.weights] + {"fp32": 8, "8bit": 2}[self.moments]
            check_memory(each * here, f"training {numbers / 1e9:,.1f} B parameters (weights, gradients, two moments)")

    def _ranks(self) -> Ranks:
        """The processes of the run, by the environment that `--ranks` or torchrun gives them."""
        size, rank, local = (int(os.environ.get(name, default)) for name, default in (
            ("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0")))
        if (size > 1 and self.compress not in IN_ROUNDS) or self.compress == "none":
            return Ranks.of_environment(self.device, self.rank_timeout)
        if size == 1:
            raise ConfigError(f"compress = {self.compress!r}: has a meaning only with several ranks: start them with "
                              "--ranks N, or by torchrun")
        address = os.environ.get(STORE) or f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        if self.sites and local:
            raise ConfigError("sites = True: each site starts one process, with its own data: leave out --ranks, or "
                              "start one process a machine")
        return Solo(Members.at(address, rank, size, self.rank_timeout), local, apart=bool(self.sites))

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in TrainConfig.__dataclass_fields__}

    def _start(self, run: Mapping[str, Any] | None) -> _Start:
        """Collect what is known before any weight is read."""
        if self.from_model is not None:
            folder = resolve(self.from_model)
            config, quant, files = open_checkpoint(folder, verify=False)
            if quant is not None:
                raise ConfigError(f"from_model = {self.from_model}: is quantized, and quantized weights cannot be "
                                  f"trained: start from {plain(self.from_model) or 'the checkpoint it was made from'}, "
                                  "or convert it back (`deepseek quantize IN OUT --format bf16`)")
            atlas = Atlas.load(folder / FILE) if (folder / FILE).is_file() else None
            if atlas is not None:
                atlas.check_fits(config)
            return _Start(config, stored_dtype(files), atlas, folder)
        if self.config is not None:
            config = self.config if isinstance(self.config, ModelConfig) else find_config(self.config)
            if not isinstance(self.config, ModelConfig) and any(Path(self.config).glob("*.safetensors")):
                print(f"the weights in {self.config} are not used, its configuration is; from_model (--from) starts "
                      "from the weights", flush=True)
            return _Start(config)
        assert run is not None
        about = run.get("about", {})
        base = about.get("from_model") if not checkpoints(Path(self.out)) else None
        return _Start(ModelConfig.from_dict(run["model"], origin=str(self.out)),
                      getattr(torch, about.get("dtype", "float32")),
                      Atlas.load(Path(self.out)) if (Path(self.out) / FILE).is_file() else None,
                      base and resolve(base))

    def _tokenizer(self, start: _Start, places: Mapping[str, Sequence[str | Path]] | None) -> Tokenizer:
        """The checkpoint's, the one given, that of an earlier start of this run, or one trained on the data."""
        folder, given = Path(self.out) / "tokenizer", start.folder or self.tokenizer
        there = (folder / "tokenizer.json").is_file()
        if given is not None:
            tokenizer = Tokenizer.load(given)
            if self.tokenizer is not None and Tokenizer.load(self.tokenizer).fingerprint != tokenizer.fingerprint:
                raise ConfigError(f"tokenizer = {self.tokenizer}: is another than that of {given}, with which its "
                                  "weights were trained; leave it out")
        elif there:
            return _fitting(Tokenizer.load(folder), start.config)
        elif places is None:  # a run of an older version, whose tokenizer was given
            found = checkpoints(Path(self.out))
            if not found:
                raise ConfigError(f"out = {self.out}: has no tokenizer; give the run's first command again")
            tokenizer = Tokenizer.load(found[-1])
        elif self.sites:
            raise ConfigError("tokenizer: must be given with sites, as all of them need the same, and one trained on "
                              "the text of a site is another; the folder of any model has one")
        else:
            print(f"training a tokenizer of {start.config.vocab_size:,} tokens on the data", flush=True)
            tokenizer = Tokenizer.train((d.text for d in read_documents(places, ReadReport(), RecordMap.of(self.map))),
                                        start.config.vocab_size)
        if there and Tokenizer.load(folder).fingerprint != tokenizer.fingerprint and run_in(Path(self.out)):
            raise ConfigError(f"{self.out} holds a run with another tokenizer than {given}; choose another --out or "
                              "remove the folder")
        if not there or Tokenizer.load(folder).fingerprint != tokenizer.fingerprint:
            with replace_folder(folder) as staging:
                _fitting(tokenizer, start.config).save(staging)
        return _fitting(tokenizer, start.config)

    def _shards(self, places: Mapping[str, Sequence[str | Path]] | None, names: Sequence[str], tokenizer: Tokenizer,
                run: Mapping[str, Any] | None) -> TokenShards:
        folder = Path(self.out) / "tokens"
        if places is None:
            return TokenShards.open(folder)
        with ProgressBar(desc="pack", unit=" tokens", unit_scale=True) as bar:
            shards, report = pack_cached(places, tokenizer, folder, valid_fraction=self.valid_fraction, names=names,
                                         progress=lambda _, tokens: bar.advance_to(tokens),
                                         mapping=RecordMap.of(self.map),
                                         expect=run["data"]["fingerprint"] if run else None)
        if report is not None:
            print(report.summary(), *shards.notes(), sep="\n", flush=True)
        return shards

    def _model(
        self, start: _Start, config: ModelConfig, run: Mapping[str, Any] | None
    ) -> tuple[CausalLM, dict[str, Any]]:
        """The model before its first step, and what identifies the checkpoint that it comes from."""
        if start.folder is not None:
            model = load_model(start.folder, torch.float32, self.device).requires_grad_(True)
            return model, {"base": {"base": fingerprint(tensor_hashes(model), model.config)}}
        model = CausalLM(config).init_weights(torch.Generator().manual_seed(self.seed)).to(self.device)
        return model, {"base": run["base"]} if run and self.config is None and "base" in run else {}


class _Start(NamedTuple):
    """The start of a run. dtype: of the resulting weights. folder: of the checkpoint whose weights are taken."""

    config: ModelConfig
    dtype: torch.dtype = torch.float32
    atlas: Atlas | None = None
    folder: Path | None = None

    def built_in(self) -> list[str]:
        """The names of the checkpoint's routing groups, in their order."""
        if self.atlas is None:
            return []
        groups = [group for group in self.atlas.groups if group.kind == "built-in"]
        names = [group.name for group in sorted(groups, key=lambda group: min(e.index for e in group.experts))]
        bound = Atlas.built_in(self.config, names)
        if any(set(bound[name]) != set(self.atlas[name]) for name in names):
            raise ConfigError(f"{self.folder}: the names built in ({', '.join(names)}) are not those of its first "
                              "routing groups, so that text cannot be bound to them; train it without names")
        return names


def loop_in_step(config: TrainConfig) -> type[TrainingLoop]:
    """The loop of ranks that take each step together."""
    if config.fsdp:
        from .fsdp import FSDPLoop  # torch's part of it takes seconds to import

        return FSDPLoop
    return ExpertParallelLoop if config.expert_parallel > 1 else TrainingLoop


def _by_name(data: Paths | Mapping[str, Paths] | None, sites: bool) -> dict[str, list[str | Path]] | None:
    """{name: its paths}, under "" those without a name. sites: some may have none."""
    if data is None:
        return None
    named = data if isinstance(data, Mapping) else {"": data}
    places = {name: [paths] if isinstance(paths, str | Path) else list(paths) for name, paths in named.items()}
    check_names((), tuple(filter(None, places)))
    if not sites and (empty := [name for name, paths in places.items() if not paths]):
        raise ConfigError(f"data{f' of {empty[0]}' if empty[0] else ''}: must name at least one path (without one, it "
                          "is a name of another site: sites)")
    if not any(places.values()):
        raise ConfigError("data: must name at least one path")
    return places


def _warn_of_doubles(places: Mapping[str, Sequence[str | Path]]) -> None:
    """Warn where one file is given under several names."""
    first: dict[Path, str] = {}
    doubles = [(path, first[real], name) for name, paths in places.items() for path in list_files(paths)
               if first.setdefault(real := path.resolve(), name) != name]
    if doubles:
        path, *names = doubles[0]
        one, other = (name or "text without a name" for name in names)
        warnings.warn(f"{path}{f' and {len(doubles) - 1:,} more' if len(doubles) > 1 else ''}: given under {one} and "
                      f"under {other}, so it is learnt twice, once for each", stacklevel=5)


def _names_of(start: _Start, places: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The names of the routing groups, in their order: those built into the checkpoint, then new ones. None where no
    text has a name."""
    config, given = start.config, [name for name in places or () if name]
    if not given:
        return ()
    built = start.built_in()
    names = (*built, *(name for name in given if name not in built))
    if config.n_group < max(2, len(names)):
        raise ConfigError(f"n_group = {config.n_group}: must be at least 2, and one for each of the {len(names)} "
                          f"expert names ({', '.join(names)})")
    if config.topk_group >= config.n_group:
        raise ConfigError(f"topk_group = {config.topk_group}: must be below n_group ({config.n_group}), or the gate "
                          "never chooses between named groups")
    return names


def _fitting(tokenizer: Tokenizer, config: ModelConfig) -> Tokenizer:
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(f"vocab_size = {config.vocab_size}: the tokenizer has {tokenizer.vocab_size} tokens")
    return tokenizer
