"""`deepseek merge`: a delta or an adapter put into its base."""

from __future__ import annotations

import argparse

from .parser import Parser


def add_flags(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="the base: a checkpoint folder or a hub id (BF16, FP32 or FP8)")
    parser.add_argument("adapter", metavar="ADAPTER", help="a delta or an adapter that `deepseek tune` or peft left")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                        help="of the weights; auto is MODEL's, or float32 where that would lose what the adapter adds")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in OUT")


def run(args: argparse.Namespace) -> None:
    from .. import convert

    print(convert.merge(args.model, args.adapter, args.out, args.dtype, overwrite=args.overwrite))
    print(f"model: {args.out}\ntry:   deepseek quantize {args.out} {args.out}-nf4")
