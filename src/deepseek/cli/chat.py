"""`deepseek chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from ..errors import RequestError
from ..settings import Option, Settings
from .common import (
    add_model_flags,
    expert_usage,
    experts_text,
    make_llm,
    report_usage,
    sampling_params,
    trace_text,
)
from .parser import Parser, add_settings

if TYPE_CHECKING:
    from ..engine.routing import Answer

COMMANDS = "/reset forgets the conversation, /experts shows who answered, /exit (or Ctrl-D) ends it"


@dataclass(frozen=True)
class ChatOptions(Settings):
    system: Annotated[str | None, Option("system message", metavar="TEXT")] = None


def add_flags(parser: Parser) -> None:
    parser.add_argument("--model", required=True, metavar="MODEL", help="a checkpoint folder or a hub id")
    add_settings(parser, ChatOptions)
    add_model_flags(parser)


def run(args: argparse.Namespace) -> None:
    params, llm = sampling_params(args), make_llm(args)
    if llm.tokenizer is None or not llm.tokenizer.has_chat_template:
        raise RequestError(f"{args.model}: has no chat template, so it is a base model, which continues text and does "
                           f"not answer: deepseek infer --model {args.model} --prompt '…'")
    usage = expert_usage(args, llm, named=True)
    messages: list[dict[str, str]] = [{"role": "system", "content": args.system}] if args.system else []
    start = len(messages)
    interactive = sys.stdin.isatty()
    if interactive:
        print(f"Type a message; {COMMANDS}.")
    while True:
        if interactive:
            print("\n> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/exit":
            break
        if line.strip() == "/reset":
            del messages[start:]
            continue
        if not line.strip():
            continue
        if line.strip() == "/experts":
            print(experts_text(llm, usage))
            continue
        if command := re.fullmatch(r"(/[a-z_]+)(\s.*)?", line.strip(), re.IGNORECASE):
            print(f"{command[1]}: no such command; {COMMANDS}", file=sys.stderr)
            continue
        messages.append({"role": "user", "content": line.rstrip("\n")})
        answer = ""
        answers: list[Answer] = []
        for piece in llm.stream(messages, params, usage=usage, adapter=args.use_adapter, on_answer=answers.append):
            answer += piece
            print(piece, end="", flush=True)
        print()
        if args.trace:
            print(trace_text(answers[0].trace), file=sys.stderr)
        messages.append({"role": "assistant", "content": answer})
    if not (args.show_experts or args.expert_map) and llm.engine.atlas is not None and (
            table := usage.named(llm.engine.atlas)):
        print(table, file=sys.stderr)
    report_usage(args, llm, usage)
