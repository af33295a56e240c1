"""`deepseek train`: its flags, and what they say to Trainer."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from ..config import PRESETS, ModelConfig
from ..data.settings import named_paths
from ..deepopt.settings import Line, RunConfig
from ..errors import ConfigError, MoEDRError
from ..settings import COUNT, Option, Settings, between
from .common import MachineOptions, add_map_flag
from .parser import Parser, add_settings, given_settings, make


@dataclass(frozen=True)
class RanksOptions(Settings):
    ranks: Annotated[int, Option(
        "processes on this machine that train together; torchrun starts them on several", COUNT)] = 1


@dataclass(frozen=True)
class PredictOptions(Settings):
    predict: Annotated[int | None, Option(
        "train nothing; print what the steps would take on so many machines like this one, for each --compress, by "
        "timing a few batches here", between(2, 4096), metavar="N_RANKS")] = None


def add_flags(parser: Parser) -> None:
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="a preset or a config.json; not with --from")
    parser.add_argument("data", nargs="*", metavar="DATA", help="text, code, JSONL or folders of them")
    parser.add_argument("--experts", nargs="+", action="extend", metavar="NAME=PATH",
                        help="text by expert: binds the routing groups to these names; a name may come several times; "
                             "with --sites, NAME alone is one of which other sites have text")
    parser.add_argument("--out", required=True, help="folder of the run")
    parser.add_config()
    add_map_flag(parser)
    add_settings(parser, RunConfig, {
        "start": "from_model tokenizer valid_fraction",
        "schedule": "steps batch_size seq_len accumulation lr min_lr_ratio warmup_steps seed",
        "optimizer": "optimizer moments weights momentum beta1 beta2 weight_decay clip",
        "losses": "mtp_weight balance_weight bias_speed guide_weight",
        "evaluation and checkpoints": "eval_every eval_batches save_every keep tensorboard",
        "ranks": "expert_parallel place_every fsdp compress powersgd_rank inner_steps overlap_steps outer_lr "
                 "outer_momentum error_decay sites balance rank_timeout",
        "machine": "precision activations gradient_checkpointing device"})
    add_settings(parser, MachineOptions, {"machine": "threads"})
    add_settings(parser, RanksOptions, {"ranks": "ranks"})
    add_settings(parser, PredictOptions, {"prediction": "predict"})
    add_settings(parser, Line, {"prediction": "bandwidth latency"})


def run(args: argparse.Namespace) -> None:
    from ..deepopt.launch import is_rank, launch
    from ..deepopt.run_folder import run_in
    from ..deepopt.trainer import Trainer

    ahead, line = make(args, PredictOptions).predict, given_settings(args, Line)
    if line and ahead is None:
        raise ConfigError(f"{', '.join(line)}: has a meaning only with --predict N_RANKS")
    if ahead is not None and (is_rank() or make(args, RanksOptions).ranks > 1):
        raise ConfigError(f"predict = {ahead}: is for one process; leave out --ranks")
    if (ranks := make(args, RanksOptions).ranks) > 1 and not is_rank():
        known = (run_in(Path(args.out)) or {"train": {}})["train"]
        given = known | given_settings(args, RunConfig)
        if given.get("sites"):
            raise ConfigError(f"ranks = {ranks}: with --sites each site starts a process of its own; leave it out")
        compress = given.get("compress", "none")
        if status := launch(ranks, compress, args.words):
            raise SystemExit(status)
        return

    given = given_settings(args, RunConfig)
    words = [word for word in (args.config, *args.data) if word is not None]
    out, start = args.out, args.from_model
    if not words and start is None and not args.experts and args.tokenizer is None:
        leg = {key: given.pop(key) for key in ("steps", "lr", "min_lr_ratio", "warmup_steps") if key in given}
        run = Trainer.resume(out, **leg)
        if (fraction := given.get("valid_fraction", run.valid_fraction)) != run.valid_fraction:
            raise ConfigError(f"valid_fraction = {fraction}: the run in {out} has {run.valid_fraction}")
        trainer, data = replace(run, map=args.map, **given), None
    else:
        if start is not None and words and _is_config(words[0]):
            raise ConfigError(f"CONFIG = {words[0]!r}: does not go with --from {start}, which brings its own "
                              "configuration; leave it out")
        if start is None and words and _is_data(words[0]):
            raise ConfigError(f"config = {words[0]!r}: is no configuration; a preset ({', '.join(PRESETS)}) or a "
                              "config.json goes before DATA, or --from MODEL instead of it")
        config = words.pop(0) if start is None and words else None
        data = None if ahead is not None else _training_data(words, args.experts, bool(given.get("sites")))
        trainer = Trainer(config, out=out, map=args.map, **given)
    if ahead is not None:
        print(trainer.predict(ahead, **line).table())
        return
    model = trainer.fit(data)
    if trainer.sites or os.environ.get("RANK", "0") == "0":
        print(f"model: {model}\nloss:  {model.parent / 'loss.png'}\nlog:   {model.parent / 'log.jsonl'}\n"
              f"try:   deepseek-infer --model {model} --prompt '…'")


def _is_config(word: str) -> bool:
    """Whether a word that stands where DATA is expected means a configuration."""
    path = Path(word)
    if not path.exists():
        return word in PRESETS
    try:
        return (path / "config.json").is_file() if path.is_dir() else (
            path.suffix == ".json" and path.stat().st_size < 1 << 20 and bool(ModelConfig.from_file(path)))
    except MoEDRError:
        return path.name == "config.json"


def _is_data(word: str) -> bool:
    """Whether a word that stands where CONFIG is expected can be none: a folder of neither a checkpoint nor a run, or a
    file of another kind."""
    path = Path(word)
    if path.is_dir():
        return not any((path / name).is_file() for name in ("config.json", "model/config.json"))
    return path.is_file() and path.suffix != ".json"


def _training_data(words: Sequence[str], experts: Sequence[str] | None, sites: bool) -> Any:
    """DATA, or {expert name: its paths} of --experts; a bare DATA beside them is text without a name."""
    if not experts:
        if not words:
            raise ConfigError("data: at least one DATA or --experts NAME=PATH must be given (--out alone continues "
                              "the run that it holds)")
        return words
    return named_paths(experts, "experts", bare=sites) | ({"": words} if words else {})
