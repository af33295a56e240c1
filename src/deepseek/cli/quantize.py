"""`deepseek quantize`: a checkpoint in fewer bits, or back."""

from __future__ import annotations

import argparse

from ..errors import ConfigError
from .parser import Parser


def add_flags(parser: Parser) -> None:
    parser.add_argument("source", metavar="IN", help="a checkpoint folder or a hub id (BF16, FP32 or FP8)")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--format", choices=("nf4", "int8", "bf16"), default="nf4",
                        help="bits of a weight; bf16 writes a plain checkpoint of a quantized one")
    parser.add_argument("--keep", nargs="+", action="extend", default=[], metavar="PATTERN",
                        help="weights that stay as they are, such as 'lm_head.*' or 'model.layers.0.*'")
    parser.add_argument("--adapter", metavar="DIR", help="a delta or a LoRA adapter of IN, to merge in first")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in OUT")


def run(args: argparse.Namespace) -> None:
    from .. import convert

    if args.format == "bf16":
        if args.keep:
            raise ConfigError(f"keep = {args.keep!r}: has a meaning only with nf4 and int8")
        if args.adapter:
            raise ConfigError(f"adapter = {args.adapter!r}: has a meaning only with nf4 and int8 (`deepseek merge IN "
                              "ADAPTER OUT` writes a plain checkpoint)")
        convert.dequantize(args.source, args.out, overwrite=args.overwrite)
    else:
        report = convert.quantize(args.source, args.out, args.format, keep=args.keep, adapter=args.adapter,
                                  overwrite=args.overwrite)
        print(report.table())
    print(f"model: {args.out}\ntry:   deepseek infer --model {args.out} --prompt '…'")
