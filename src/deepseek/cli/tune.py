"""`deepseek tune`: its flags, and what they say to MoEFineTuner."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError, nearest
from ..settings import rename
from ..tune.settings import TuneConfig
from .common import add_map_flag, template_variables
from .parser import Parser, add_settings, tell

# fields of LoRAAdapter, as --adapter takes them
_FIELDS: dict[str, Callable[[str], Any]] = {
    "r": int, "lora_alpha": float, "lora_dropout": float, "target_modules": lambda names: names.split(","),
    "experts": lambda names: names.split(","), "bias": str, "task_type": str}
_OLDER_FLAGS: dict[str, tuple[str, Any]] = {  # what stood for them before
    "r": ("r", int), "lora_alpha": ("lora_alpha", float), "lora_dropout": ("lora_dropout", float),
    "target_modules": ("target_modules", None), "lora_experts": ("experts", None)}
_RENAMED = {"general": "retain_data", "old": "replay_data", "lora": "adapter"}


def add_flags(parser: Parser) -> None:
    """All settings of TuneConfig and LoRAAdapter; none has a default here, so that a file can say what no flag does."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a checkpoint folder or a hub id")
    parser.add_argument("data", nargs="*", metavar="DATA", default=None,
                        help="records: files or folders (see `deepseek data`), or - for JSON lines on standard input, "
                           "learnt round by round")
    parser.add_argument("--config", metavar="YAML", help="a file with any of these settings; flags win over it")
    parser.add_argument("--out", help="folder of the run; else MODEL-tuned-HASH, with a hash of MODEL's path")
    parser.add_argument("--retain_data", nargs="+", metavar="PATH",
                        help="general text that must not be forgotten, to measure it")
    parser.add_argument("--replay_data", nargs="+", metavar="PATH", help="records of earlier training, for --replay")
    for flag in ("general", "old"):
        parser.add_argument(f"--{flag}", nargs="+", help=argparse.SUPPRESS)
    add_map_flag(parser)
    parser.add_argument("--show_records", type=int, metavar="N",
                        help="print what would be learnt of the first N records, and stop")
    parser.add_argument("--save", choices=("auto", "delta", "full"), help="what to leave (default: auto)")
    parser.add_argument("--records_a_round", type=int, help="records of standard input a round (default: 256)")
    parser.add_argument("--rounds", type=int, help="rounds of standard input to learn; else all until it ends")
    for flag, (_, kind) in _OLDER_FLAGS.items():
        parser.add_argument(f"--{flag}", help=argparse.SUPPRESS, **({"type": kind} if kind else {"nargs": "+"}))
    names = {"nargs": "+", "metavar": "NAME"}
    add_settings(parser, TuneConfig, {
        "what is trained": "expert_tune expert_freeze atlas score threshold shared_experts non_expert_modules "
                           "train_router balance",
        "records": "max_length overlong chat_template_kwargs parse_special reasoning valid_fraction replay",
        "schedule": "lr epochs steps batch_size accumulation warmup min_lr_ratio weight_decay clip seed",
        "evaluation and checkpoints": "eval_every eval_records general_records save_every",
        "machine": "precision gradient_checkpointing device"},
        expert_tune=names, expert_freeze=names, chat_template_kwargs={"type": template_variables, "metavar": "JSON"})
    parser.group("what is trained").add_argument("--adapter", nargs="+", metavar="FIELD=VALUE",
                        help="train a LoRA adapter alone: its fields, such as r=16 lora_alpha=32 lora_dropout=0.05 "
                           "target_modules=q_proj,v_proj experts=law_expert,3.17")
    parser.group("machine").add_argument("--threads", type=int, help="CPU threads; torch's choice if not given")


def run(args: argparse.Namespace) -> None:
    """Settings of the file, flags over them; then tune."""
    from ..tune.tuner import MoEFineTuner

    settings: dict[str, Any] = {}
    if args.config:
        from ..files import read_yaml

        settings = read_yaml(args.config)
        if not isinstance(settings, dict):
            raise ConfigError(f"{args.config}: must be a table of settings, got {type(settings).__name__}")
    flags = {key: value for key, value in vars(args).items()
             if value not in (None, []) and key not in ("run", "usage", "config", "threads", "command")}
    settings, flags = rename(settings, _RENAMED, tell, "`{}`"), rename(flags, _RENAMED, tell, "--{}")
    adapter = _adapter(settings, flags)
    settings |= flags
    if settings.get("expert_tune") == ["auto"]:
        settings["expert_tune"] = "auto"
    for key in ("data", "retain_data", "replay_data"):  # here all are paths, also where nothing is
        if settings.get(key, "-") not in ("-", ["-"]):
            value = settings[key]
            settings[key] = [Path(place) for place in ([value] if isinstance(value, str) else value)]
    model, data, size, rounds, shown = (settings.pop(key, None) for key in (
        "model", "data", "records_a_round", "rounds", "show_records"))
    if not model or not data:
        raise ConfigError("model and data must be given, on the command line or in the file of --config")
    if "model_path" in settings:
        raise ConfigError("unknown setting model_path; in the file the model is `model`")
    tuner = MoEFineTuner(model, adapter=adapter, **settings)
    piped = data in ("-", ["-"])
    if piped:
        data = (_json_line(line, number) for number, line in enumerate(sys.stdin, 1) if line.strip())
    if shown is not None:
        tuner.show(data, shown)
        return
    report = tuner.fit(data) if not piped else tuner.fit_stream(
        data, records_a_round=256 if size is None else size, rounds=rounds)
    whole = Path(report.result).name == "model"
    print(f"try:   deepseek infer --model {report.result if whole else f'{model} --adapter {report.result}'} "
          "--prompt '…'")


def _adapter(settings: dict[str, Any], flags: dict[str, Any]) -> Any:
    """What file and flags say of the adapter, taken out of both; flags win, field by field. None if nothing is said."""
    adapter = settings.pop("adapter", None)
    given: dict[str, Any] = {}
    for flag, (field, _) in _OLDER_FLAGS.items():
        if flag in flags:
            given[field] = flags.pop(flag)
            value = ",".join(map(str, given[field])) if isinstance(given[field], list) else given[field]
            tell(f"--{flag} is called --adapter {field}={value} now")
    given |= _fields(flags.pop("adapter", []))
    if not given or not (adapter is None or isinstance(adapter, dict)):  # what is no table is refused by its reader
        return adapter
    return (adapter or {}) | given


def _fields(words: Sequence[str]) -> dict[str, Any]:
    """FIELD=VALUE words of --adapter."""
    found: dict[str, Any] = {}
    for word in words:
        field, equals, value = word.partition("=")
        kind = _FIELDS.get(field)
        if not equals or not value or kind is None:
            hint = "; to go on from a trained adapter, merge it first (`deepseek merge MODEL ADAPTER OUT`)" if (
                Path(word).exists()) else nearest(field, _FIELDS)
            raise ConfigError(f"adapter = {word!r}: must read FIELD=VALUE, and the fields are "
                              f"{', '.join(_FIELDS)}{hint}")
        if field in found:
            raise ConfigError(f"adapter: {field} is given twice")
        try:
            found[field] = kind(value)
        except ValueError:
            raise ConfigError(f"adapter: {field} = {value!r}: must be a number") from None
    return found


def _json_line(line: str, number: int) -> Any:
    """The value of one line of standard input."""
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(f"standard input:{number}: not JSON: {error}") from None
