"""`deepseek info`: a configuration in figures, and whether a checkpoint loads."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import PRESETS, ModelConfig
from ..errors import ConfigError, printable

if TYPE_CHECKING:
    from ..checkpoint import Verdict
from .parser import Parser


def add_flags(parser: Parser) -> None:
    parser.add_argument("model", metavar="NAME|PATH", help="a preset, a config.json, a checkpoint folder or a hub id")
    parser.add_argument("--context", type=int, default=4096, help="tokens of context for attention FLOPs and the cache")
    parser.add_argument("--machine", action="store_true", help="measure this machine and say which formats fit")
    parser.add_argument("--price_per_hour", type=float, help="price of the machine, for the cost of 10^8 tokens")
    parser.add_argument("--tokens_per_second", type=float, help="throughput for the cost; else this machine's bound")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    from .. import info as accounting

    config, judged = _judged(args.model)
    described = accounting.describe(config, name=args.model, context=args.context)
    priced = args.price_per_hour is not None and args.tokens_per_second is None
    machine = accounting.measure_machine() if args.machine or priced else None
    fits = accounting.fit(described, machine, context=args.context) if machine else None
    extra = {"fits": fits, "machine": machine, "price_per_hour": args.price_per_hour,
             "tokens_per_second": args.tokens_per_second}
    if args.json:
        from ..files import to_json

        loads = None if judged is None else {"yes": judged.because is None, "because": judged.because or judged.about}
        print(to_json(accounting.to_json(described, **extra) | {"loads_here": loads}, indent=2))
        return
    print(accounting.render(described, **extra))
    if judged is None:
        print(f"try:   deepseek train {args.model} DATA --out runs/first")
        return
    if judged.because is None:
        print(f"try:   deepseek infer --model {args.model} --prompt '…'")
    print(printable(str(judged)))


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
