"""`deepseek upcycle`: a dense model as a DeepSeek-V3 that computes the same, or with experts carved out of its FFN."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Annotated, Literal

from ..errors import ConfigError
from ..settings import COUNT, Option, Settings, declared
from ..upcycle.carve_settings import CarveConfig
from .parser import Parser, add_settings, given_settings, make


@dataclass(frozen=True)
class UpcycleOptions(Settings):
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], Option(
        "of the weights; auto is SOURCE's if that is bfloat16, else float32")] = "auto"
    context: Annotated[int | None, Option("positions to keep, if not all", COUNT)] = None
    check: Annotated[bool, Option(
        "compare the result with SOURCE: logits and greedy tokens (needs transformers)")] = False
    overwrite: Annotated[bool, Option("replace what is in OUT")] = False


def add_flags(parser: Parser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a LlamaForCausalLM, MistralForCausalLM or Qwen2ForCausalLM: "
                        "a folder, a hub id or a .gguf file")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    add_settings(parser, UpcycleOptions)
    add_settings(parser, CarveConfig, {"experts out of the dense FFN": " ".join(
        one.name for one in declared(CarveConfig))})


def run(args: argparse.Namespace) -> None:
    from .. import convert
    from ..convert.upcycling import transformers_library

    options, carving = make(args, UpcycleOptions), make(args, CarveConfig)
    if carving.carve is not None:
        _carve(args, options, carving)
        return
    if idle := [*given_settings(args, CarveConfig)]:
        raise ConfigError(f"{idle[0]} = {getattr(carving, idle[0])}: has a meaning only with carve")
    if options.check:
        transformers_library()  # before the work
    print(convert.upcycle(args.source, args.out, options.dtype, context=options.context, overwrite=options.overwrite))
    if options.check:
        print(convert.compare(args.source, args.out))
    print(f"model: {args.out}\ntry:   deepseek quantize {args.out} {args.out}-int8 --format int8")


def _carve(args: argparse.Namespace, options: UpcycleOptions, carving: CarveConfig) -> None:
    from ..upcycle.carve import carve

    if options.check:
        raise ConfigError("check = True: a model with carved experts computes something else than SOURCE (report.json "
                          "says how far off each layer is)")
    print(carve(args.source, args.out, carving, options.dtype, context=options.context, overwrite=options.overwrite))
    print(f"model: {args.out}\nreport: {args.out}/report.json\ntry:   deepseek-infer --model {args.out} --prompt '…'")
