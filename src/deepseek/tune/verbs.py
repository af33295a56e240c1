"""`deepseek tune`: its flags, and what they say to MoEFineTuner. Nothing heavy up here: `--help` loads it."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..conversation import template_variables
from ..errors import ConfigError, DataError
from .settings import TuneConfig

LORA_FLAGS = {"r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "target_modules": "target_modules",
              "lora_experts": "experts"}


def add_tune_flags(verb: argparse.ArgumentParser) -> None:
    """All settings of TuneConfig and LoRAAdapter; none has a default here, so that a file can say what no flag does."""
    verb.add_argument("model", nargs="?", metavar="MODEL", help="a checkpoint folder or a hub id")
    verb.add_argument("data", nargs="*", metavar="DATA", default=None,
                      help="records: files or folders (see `deepseek data`), or - for JSON lines on standard input, "
                           "learnt round by round")
    verb.add_argument("--config", metavar="YAML", help="a file with any of these settings; flags win over it")
    verb.add_argument("--out", help="folder of the run (MODEL-tuned-HASH, of where MODEL is)")
    verb.add_argument("--general", nargs="+", metavar="PATH", help="text that must not be forgotten, to measure it")
    verb.add_argument("--old", nargs="+", metavar="PATH", help="records of earlier training, for --replay")
    verb.add_argument("--map", metavar="YAML", help="which column of a record is what, where its name does not say it")
    verb.add_argument("--show_records", type=int, metavar="N",
                      help="print what would be learnt of the first N records, and stop")
    verb.add_argument("--save", choices=("auto", "delta", "full"), help="what to leave (auto)")
    verb.add_argument("--records_a_round", type=int, help="records of standard input that make a round (256)")
    verb.add_argument("--rounds", type=int, help="rounds after which standard input is left (its end)")
    verb.add_argument("--r", type=int, help="LoRA: rank of the side paths; makes this a LoRA tuning")
    verb.add_argument("--lora_alpha", type=float, help="LoRA: the side path counts alpha / r (8)")
    verb.add_argument("--lora_dropout", type=float, help="LoRA: share of its inputs dropped (0)")
    verb.add_argument("--target_modules", nargs="+", help="LoRA: linear modules, such as q_proj, v_proj, all-linear")
    verb.add_argument("--lora_experts", nargs="+", metavar="NAME", help="LoRA: experts that get side paths too")
    verb.add_argument("--threads", type=int, help="CPU threads; torch's choice if not given")
    kinds: dict[str, Any] = {"chat_template_kwargs": template_variables, "atlas": str, "threshold": float,
                             "steps": int, "max_length": int}
    for setting in fields(TuneConfig):
        flag, text, default = f"--{setting.name}", setting.metadata["help"], setting.default
        if default is False:
            verb.add_argument(flag, action="store_true", default=None, help=text)
        elif setting.name in ("expert_tune", "expert_freeze"):
            verb.add_argument(flag, nargs="+", metavar="NAME", help=text)
        else:
            shown = "" if default is None else f" ({default})"
            verb.add_argument(flag, type=kinds.get(setting.name) or type(default), help=text + shown,
                              metavar="JSON" if setting.name == "chat_template_kwargs" else None)


def run(args: argparse.Namespace) -> None:
    """Settings of the file, flags over them; then tune."""
    from .lora import LoRAAdapter
    from .tuner import MoEFineTuner

    settings: dict[str, Any] = {}
    if args.config:
        from ..files import read_yaml

        settings = read_yaml(args.config)
        if not isinstance(settings, dict):
            raise ConfigError(f"{args.config}: must be a table of settings, got {type(settings).__name__}")
    settings |= {key: value for key, value in vars(args).items()
                 if value not in (None, []) and key not in ("run", "usage", "config", "threads")}
    lora = settings.pop("lora", {})
    if not isinstance(lora, dict):
        raise ConfigError(f"lora = {lora!r}: must be a table such as {{r: 16, target_modules: [q_proj]}}")
    for flag, key in LORA_FLAGS.items():
        if flag in settings:
            lora[key] = settings.pop(flag)
    if unknown := sorted(set(lora) - {field.name for field in fields(LoRAAdapter)}):
        raise ConfigError(f"lora: unknown setting {', '.join(unknown)}; there are "
                          f"{', '.join(field.name for field in fields(LoRAAdapter))}")
    if settings.get("expert_tune") == ["auto"]:
        settings["expert_tune"] = "auto"
    for key in ("data", "general", "old"):  # here all are paths, also where nothing is
        if settings.get(key, "-") not in ("-", ["-"]):
            value = settings[key]
            settings[key] = [Path(place) for place in ([value] if isinstance(value, str) else value)]
    model, data, size, rounds, shown = (settings.pop(key, None) for key in (
        "model", "data", "records_a_round", "rounds", "show_records"))
    if not model or not data:
        raise ConfigError("model and data must be given, on the command line or in the file of --config")
    if odd := sorted({"model_path", "adapter"} & set(settings)):
        raise ConfigError(f"unknown setting {odd[0]}; in the file the model is `model`, side paths are `lora`")
    tuner = MoEFineTuner(model, adapter=LoRAAdapter(**lora) if lora else None, **settings)
    piped = data in ("-", ["-"])
    if piped:
        data = (_json_line(line, number) for number, line in enumerate(sys.stdin, 1) if line.strip())
    if shown is not None:
        tuner.show(data, shown)
    elif piped:
        tuner.fit_stream(data, records_a_round=256 if size is None else size, rounds=rounds)
    else:
        tuner.fit(data)


def _json_line(line: str, number: int) -> Any:
    """The value of one line of standard input."""
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(f"standard input:{number}: not JSON: {error}") from None
