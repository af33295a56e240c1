"""`deepseek route …`: who of a pool serves a text, and a pool's classifier as one small file."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from ..errors import printable
from ..files import to_json
from ..progress import ProgressBar
from ..settings import NATURAL, Option, Settings
from .common import decision_lines
from .parser import Parser, add_command, add_settings, add_steps, make


@dataclass(frozen=True)
class SeedOptions(Settings):
    seed: Annotated[int, Option("of the classifier's training", NATURAL)] = 0


@dataclass(frozen=True)
class RouteOptions(SeedOptions):
    pool: Annotated[Path | None, Option("the pool file", metavar="FILE")] = None
    scorer: Annotated[Literal["keywords", "classifier"] | None, Option(
        "what gives members their probabilities; else what the pool file says, or keywords")] = None
    composite: Annotated[bool, Option("split a request into its sub-tasks, and route each")] = False
    trace: Annotated[bool, Option("print keywords, scores and threshold, too")] = False
    json: Annotated[bool, Option("print all of it as JSON")] = False


def add_flags(parser: Parser) -> None:
    steps = add_steps(parser)
    step = add_command(steps, "text", text, "who of a pool serves a text")
    step.add_argument("text", metavar="TEXT", help="a request; - reads it from standard input")
    add_settings(step, RouteOptions)
    step = add_command(steps, "distill", distill, "write a pool's classifier as one file for devices without torch")
    step.add_argument("pool", metavar="POOL", help="the pool file")
    step.add_argument("out", metavar="OUT", help="the file to write, at most 1 MB")
    add_settings(step, SeedOptions)


def text(args: argparse.Namespace) -> None:
    from ..errors import ConfigError
    from ..route import ExpertPool

    options = make(args, RouteOptions)
    if options.pool is None:
        raise ConfigError("pool: must be given: --pool FILE")
    pool = ExpertPool.load(options.pool, options.scorer, seed=options.seed)
    asked = sys.stdin.read() if args.text == "-" else args.text
    if not options.composite:
        decision = pool.route(asked)
        if options.json:
            print(to_json(decision.to_dict(), ensure_ascii=False))
        else:
            print("\n".join(decision_lines(decision.to_dict(), options.trace)))
        return
    parts = pool.parts(asked)
    if options.json:
        print(to_json({"context": parts[0].context, "parts": [one.to_dict() for one in parts]}, ensure_ascii=False))
        return
    if options.trace and parts[0].context:
        print(f"context: {_line(parts[0].context)}")
    for number, one in enumerate(parts, 1):
        reason = f", {one.reason}" if one.reason else ""
        print(f"{number}. {_line(one.text)} (characters {one.start} to {one.start + len(one.text)}{reason})")
        print("\n".join(f"   {line}" for line in decision_lines(one.to_dict(), options.trace)))


def _line(text: str, most: int = 72) -> str:
    line = " ".join(text[:1000].split())
    return printable(line if len(line) <= most else line[:most - 1] + "…")


def distill(args: argparse.Namespace) -> None:
    from ..route import ExpertPool
    from ..route.distilled import distill

    pool = ExpertPool.load(args.pool, seed=make(args, SeedOptions).seed)
    with ProgressBar(desc="train", unit=" batches") as bar:
        same = distill(pool, args.out, lambda done, total: bar.advance_to(done))
    print(f"router: {args.out}, {Path(args.out).stat().st_size:,} bytes; on {same:.1%} of the held-out samples the "
          f"same choice as the classifier\ntry:    python examples/edge_router.py {args.out} TEXT")
