"""`deepseek infer`: prompts of the command line, of standard input or of a file, to LLM."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ..errors import ConfigError, RequestError
from ..settings import Option, Settings
from .common import (
    add_model_flags,
    expert_usage,
    make_llm,
    named_shares,
    report_usage,
    sampling_params,
    trace_text,
)
from .parser import Parser, add_settings

if TYPE_CHECKING:
    from ..engine.routing import Answer


@dataclass(frozen=True)
class PromptOptions(Settings):
    prompt: Annotated[str | None, Option("the prompt; else standard input", metavar="TEXT")] = None
    chat: Annotated[bool, Option("put the prompt into the chat template")] = False
    parse_special: Annotated[bool, Option(
        "control tokens spelled out in a prompt count as such (a template of one's own, FIM)")] = False


def add_flags(parser: Parser) -> None:
    parser.add_argument("--model", required=True, metavar="MODEL", help="a checkpoint folder or a hub id")
    add_settings(parser, PromptOptions)
    parser.add_argument("--input", metavar="JSONL", help="prompts, one object a line: {prompt | messages, id, …}")
    parser.add_argument("--output", metavar="JSONL", help="answers to --input, in its order; continued if it exists")
    add_model_flags(parser)


def run(args: argparse.Namespace) -> None:
    if (args.input is None) != (args.output is None):
        raise ConfigError("--input and --output: must be given together")
    if args.input is not None:
        if args.prompt is not None or args.chat:
            raise ConfigError("--input: the prompts are in the file; --prompt and --chat do not apply")
        if args.trace:
            raise ConfigError("--input: each answer has its `routing`; --trace does not apply")
        _infer_file(args)
        return
    if args.chat and args.parse_special:
        raise ConfigError("--parse_special: is for raw prompts; with --chat the template writes the control tokens")
    prompt = args.prompt if args.prompt is not None else sys.stdin.read()
    if not prompt:
        raise RequestError("prompt = '': must not be empty (give --prompt or text on standard input)")
    params, llm = sampling_params(args), make_llm(args)
    usage = expert_usage(args, llm)
    answers: list[Answer] = []
    for piece in llm.stream([{"role": "user", "content": prompt}] if args.chat else prompt, params, usage=usage,
                            parse_special=bool(args.parse_special), adapter=args.use_adapter,
                            on_answer=answers.append):
        print(piece, end="", flush=True)
    print()
    if args.trace:
        print(trace_text(answers[0].trace, named_shares(llm, usage)), file=sys.stderr)
    report_usage(args, llm, usage)
    if sys.stdout.isatty():  # text in a pipe is the answer alone
        print(f"try:   deepseek infer --model {args.model} --show_experts --prompt '…'" if not args.show_experts else
              f"try:   deepseek serve {args.model}", file=sys.stderr)


def _infer_file(args: argparse.Namespace) -> None:
    from ..engine.run_batch import check_files, run_file
    from ..progress import ProgressBar

    source, target = Path(args.input), Path(args.output)
    if source.resolve() == target.resolve():
        raise ConfigError(f"output = {str(target)!r}: must be another file than the input")
    check_files(source, target)  # before a large model is loaded
    params, llm = sampling_params(args), make_llm(args)
    usage = expert_usage(args, llm)
    stats = llm.engine.stats
    with ProgressBar(unit="prompt", desc="infer") as bar:
        def show(done: int, total: int) -> None:
            bar.advance_to(done, total)
            elapsed = bar.format_dict["elapsed"]
            bar.set_postfix_str(f"{stats.sampled / elapsed if elapsed else 0:,.0f} tokens/s", refresh=False)

        answered, errors = run_file(llm, source, target, params, show, usage,
                                    parse_special=bool(args.parse_special), adapter=args.use_adapter)
    print(f"{answered:,} answers written to {target}" + (f", {errors:,} of them errors" if errors else ""),
          file=sys.stderr)
    report_usage(args, llm, usage)
