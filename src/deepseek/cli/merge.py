"""`deepseek merge`: a delta or an adapter put into its base."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Annotated

from ..settings import Option, Settings
from .common import Dtype
from .parser import Parser, add_settings, make


@dataclass(frozen=True)
class MergeOptions(Settings):
    dtype: Annotated[Dtype, Option(
        "of the weights; auto is MODEL's, or float32 where that would lose what the adapter adds")] = "auto"
    overwrite: Annotated[bool, Option("replace what is in OUT")] = False


def add_flags(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="the base: a checkpoint folder or a hub id (BF16, FP32 or FP8)")
    parser.add_argument("adapter", metavar="ADAPTER", help="a delta or an adapter that `deepseek tune` or peft left")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    add_settings(parser, MergeOptions)


def run(args: argparse.Namespace) -> None:
    from .. import convert

    print(convert.merge(args.model, args.adapter, args.out, **vars(make(args, MergeOptions))))
    print(f"model: {args.out}\ntry:   deepseek quantize {args.out} {args.out}-nf4")
