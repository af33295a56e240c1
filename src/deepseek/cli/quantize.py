"""`deepseek quantize`: a checkpoint in fewer bits, or back."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from ..errors import ConfigError
from ..settings import Option, Settings
from .parser import Parser, add_settings, make


@dataclass(frozen=True)
class QuantizeOptions(Settings):
    format: Annotated[Literal["nf4", "int8", "bf16"], Option(
        "bits of a weight; bf16 writes a plain checkpoint of a quantized one")] = "nf4"
    keep: Annotated[tuple[str, ...], Option(
        "weights that stay as they are, such as 'lm_head.*' or 'model.layers.0.*'", metavar="PATTERN")] = ()
    adapter: Annotated[str | Path | None, Option(
        "a delta or a LoRA adapter of IN, to merge in first", metavar="DIR")] = None
    overwrite: Annotated[bool, Option("replace what is in OUT")] = False


def add_flags(parser: Parser) -> None:
    parser.add_argument("source", metavar="IN", help="a checkpoint folder or a hub id (BF16, FP32 or FP8)")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    add_settings(parser, QuantizeOptions)


def run(args: argparse.Namespace) -> None:
    from .. import convert

    options = make(args, QuantizeOptions)
    if options.format == "bf16":
        if options.keep:
            raise ConfigError(f"keep = {list(options.keep)}: has a meaning only with nf4 and int8")
        if options.adapter:
            raise ConfigError(f"adapter = {options.adapter!r}: has a meaning only with nf4 and int8 (`deepseek merge "
                              "IN ADAPTER OUT` writes a plain checkpoint)")
        convert.dequantize(args.source, args.out, overwrite=options.overwrite)
    else:
        report = convert.quantize(args.source, args.out, options.format, keep=options.keep, adapter=options.adapter,
                                  overwrite=options.overwrite)
        print(report.table())
    print(f"model: {args.out}\ntry:   deepseek infer --model {args.out} --prompt '…'")
