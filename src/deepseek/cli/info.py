"""`deepseek info`: a configuration in figures, and whether a checkpoint loads."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..config import PRESETS, ModelConfig
from ..errors import ConfigError, printable
from ..files import read_json
from ..settings import COUNT, NOT_NEGATIVE, POSITIVE, Option, Settings
from .parser import Parser, add_settings, make

if TYPE_CHECKING:
    from ..checkpoint import Verdict


@dataclass(frozen=True)
class InfoOptions(Settings):
    context: Annotated[int, Option("tokens of context for attention FLOPs and the cache", COUNT)] = 4096
    machine: Annotated[bool, Option("measure this machine and say which formats fit")] = False
    price_per_hour: Annotated[float | None, Option(
        "price of the machine, for the cost of 10^8 tokens", NOT_NEGATIVE)] = None
    tokens_per_second: Annotated[float | None, Option(
        "throughput for the cost; else this machine's bound", POSITIVE)] = None
    json: Annotated[bool, Option("print JSON")] = False


def add_flags(parser: Parser) -> None:
    parser.add_argument("model", metavar="NAME|PATH", help="a preset, a config.json, a checkpoint folder or a hub id")
    add_settings(parser, InfoOptions)


def run(args: argparse.Namespace) -> None:
    from .. import info as accounting

    options = make(args, InfoOptions)
    config, judged = _judged(args.model)
    described = accounting.describe(config, name=args.model, context=options.context)
    priced = options.price_per_hour is not None and options.tokens_per_second is None
    machine = accounting.measure_machine() if options.machine or priced else None
    fits = accounting.fit(described, machine, context=options.context) if machine else None
    extra: dict[str, Any] = {"fits": fits, "machine": machine, "price_per_hour": options.price_per_hour,
             "tokens_per_second": options.tokens_per_second}
    if options.json:
        from ..files import to_json

        loads = None if judged is None else {"yes": judged.because is None, "because": judged.because or judged.about}
        print(to_json(accounting.to_json(described, **extra) | {"loads_here": loads, "lossy": _lossy(args.model)},
                      indent=2))
        return
    print(accounting.render(described, **extra))
    if judged is None:
        print(f"try:   deepseek train {args.model} DATA --out runs/first")
        return
    if judged.because is None:
        print(f"try:   deepseek infer --model {args.model} --prompt '…'")
    print(printable(str(judged)))
    if _lossy(args.model):
        print("lossy: computes something else than the dense model that it was made of (report.md)")


def _lossy(name: str) -> bool:
    """Whether the report beside a checkpoint says so."""
    report = Path(name).expanduser() / "report.json"
    return report.is_file() and read_json(report, ConfigError).get("lossy") is True


def _judged(name: str) -> tuple[ModelConfig, Verdict | None]:
    """The configuration that `info` accounts for, and whether the checkpoint loads; None where there is none."""
    path = Path(name).expanduser()
    if path.is_file():
        return ModelConfig.from_file(path, strict=True), None
    if not path.exists() and name in PRESETS:
        return ModelConfig.preset(name), None
    from ..checkpoint import resolve, verdict

    judged = verdict(folder := resolve(name, weights=False))
    if (inside := ModelConfig.of_wrapper(folder)) is not None:  # accounted for all the same
        return inside[0], judged
    try:
        return ModelConfig.from_file(folder), judged
    except ConfigError as error:
        raise ConfigError(f"loads here: no, because {error}") from None
