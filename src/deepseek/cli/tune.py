"""`deepseek tune`: its flags, and what they say to MoEFineTuner."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError, nearest
from ..settings import declared
from ..tune.settings import RunOptions, TuneConfig
from .common import MachineOptions, add_map_flag
from .parser import Parser, add_settings, given_settings, make, tell

OLDER = {"r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "target_modules": "target_modules",
         "lora_experts": "experts"}  # flags of the first release -> fields of --adapter


def add_flags(parser: Parser) -> None:
    """All settings of TuneConfig and LoRAAdapter; none has a default here, so that a file can say what no flag does."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a checkpoint folder or a hub id")
    parser.add_argument("data", nargs="*", metavar="DATA", default=None,
                        help="records: files or folders (see `deepseek data`), or - for JSON lines on standard input, "
                           "learnt round by round")
    parser.add_config()
    parser.add_argument("--out", help="folder of the run; else MODEL-tuned-HASH, with a hash of MODEL's path")
    parser.add_argument("--retain_data", nargs="+", metavar="PATH",
                        help="general text that must not be forgotten, to measure it")
    parser.add_argument("--replay_data", nargs="+", metavar="PATH", help="records of earlier training, for --replay")
    parser.add_former("general", "retain_data", nargs="+")
    parser.add_former("old", "replay_data", nargs="+")
    add_map_flag(parser)
    add_settings(parser, RunOptions)
    add_settings(parser, TuneConfig, {
        "what is trained": "expert_tune expert_freeze atlas score threshold shared_experts non_expert_modules "
                           "train_router balance",
        "records": "max_length overlong chat_template_kwargs parse_special reasoning valid_fraction replay",
        "schedule": "lr epochs steps batch_size accumulation warmup min_lr_ratio weight_decay clip seed",
        "evaluation and checkpoints": "eval_every eval_records general_records save_every",
        "machine": "precision gradient_checkpointing device"})
    add_settings(parser, MachineOptions, {"machine": "threads"})
    parser.group("what is trained").add_argument(
        "--adapter", nargs="+", metavar="FIELD=VALUE", help="train a LoRA adapter alone: its fields, such as r=16 "
        "lora_alpha=32 lora_dropout=0.05 target_modules=q_proj,v_proj experts=law_expert,3.17")
    parser.checked.add("adapter")
    parser.renamed["lora"] = "adapter"  # in files
    for flag in OLDER:
        parser.add_argument(f"--{flag}", nargs="+", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> None:
    """Settings of the file, flags over them; then tune."""
    from ..tune.tuner import MoEFineTuner

    run, given = make(args, RunOptions), given_settings(args, TuneConfig)
    model, data = args.model, args.data
    if not model or not data:
        raise ConfigError("model and data must be given, on the command line or in the file of --config")
    retained, replayed = (None if places is None else [*map(Path, places)]  # paths, also where nothing is
                          for places in (args.retain_data, args.replay_data))
    tuner = MoEFineTuner(model, adapter=_adapter(args), retain_data=retained, replay_data=replayed, map=args.map,
                         out=args.out, save=run.save, **given)
    if piped := data == ["-"]:
        data = (_json_line(line, number) for number, line in enumerate(sys.stdin, 1) if line.strip())
    else:
        data = [*map(Path, data)]
        for name in {"records_a_round", "rounds"} & {*given_settings(args, RunOptions)}:
            raise ConfigError(f"{name} = {getattr(run, name)}: has a meaning only for records on standard input (-)")
    if run.show_records is not None:
        tuner.show(data, run.show_records)
        return
    report = tuner.fit(data) if not piped else tuner.fit_stream(
        data, records_a_round=run.records_a_round, rounds=run.rounds)
    whole = Path(report.result).name == "model"
    print(f"try:   deepseek infer --model {report.result if whole else f'{model} --adapter {report.result}'} "
          "--prompt '…'")


def _adapter(args: argparse.Namespace) -> Any:
    """What file and flags say of the adapter; flags win, field by field. None if nothing is said."""
    in_file = getattr(args, "from_file", {}).get("adapter")
    words = [] if args.adapter is None or args.adapter is in_file else list(args.adapter)
    for flag, field in OLDER.items():
        if (values := getattr(args, flag)) is not None:
            words.append(f"{field}={','.join(values)}")
            tell(f"--{flag} is called --adapter {words[-1]} now")
    if not words or not (in_file is None or isinstance(in_file, dict)):  # what is no table is refused by its reader
        return in_file
    return (in_file or {}) | _fields(words)


def _fields(words: Sequence[str]) -> dict[str, Any]:
    """FIELD=VALUE words of --adapter."""
    from ..tune.lora import LoRAAdapter

    fields = {one.name: one for one in declared(LoRAAdapter)}
    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not value or name not in fields:
            hint = "; to go on from a trained adapter, merge it first (`deepseek merge MODEL ADAPTER OUT`)" if (
                Path(word).exists()) else nearest(name, fields)
            raise ConfigError(f"adapter = {word!r}: must read FIELD=VALUE, and the fields are "
                              f"{', '.join(fields)}{hint}")
        if name in found:
            raise ConfigError(f"adapter: {name} is given twice")
        try:
            found[name] = value.split(",") if fields[name].many else fields[name].kind(value)
        except ValueError:
            raise ConfigError(f"adapter: {name} = {value!r}: must be a number") from None
    return found


def _json_line(line: str, number: int) -> Any:
    """The value of one line of standard input."""
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(f"standard input:{number}: not JSON: {error}") from None
