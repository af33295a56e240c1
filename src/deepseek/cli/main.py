"""The command `deepseek`: one table of commands, each of which is a module beside this one, loaded when it is run."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import Any

from .. import __version__
from ..errors import MoEDRError, printable
from ..interrupts import Stopped, handled
from .common import apply_device
from .parser import Parser, add_command

COMMANDS = {  # in the order of the help
    "info": "parameters, FLOPs, memory and cost of a model, and what fits this machine",
    "data": "prepare data: validate, deduplicate, label, split and pack records",
    "train": "train a model from scratch or from a checkpoint; the same command, or --out alone, continues a stopped "
             "run, more --steps extend it",
    "atlas": "measure, show and compare which experts serve which domain",
    "tune": "tune experts or a LoRA adapter on records; the same command continues a stopped run",
    "quantize": "write a checkpoint in fewer bits; the same command continues a stopped run",
    "merge": "write the checkpoint that a delta or a LoRA adapter makes of its base; the same command continues "
             "a stopped run",
    "upcycle": "write a dense model as a DeepSeek-V3 that computes the same; the same command continues a stopped run",
    "pull": "put a ready model (mini) together in the user's cache",
    "experts": "install, remove, export, list and verify packages of named experts",
    "knowledge": "put files into knowledge bases, and search in them",
    "route": "who of a pool of experts, adapters and knowledge bases serves a text",
    "eval": "measure a model on the tasks of lm-evaluation-harness, alone or beside another",
    "infer": "complete a prompt, printing text as it comes",
    "chat": "chat with a model in the terminal",
    "serve": "serve a model over HTTP with OpenAI's API",
    "watch": "show the state of a running server, or of a run of training, in the terminal",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for what the user can mend, 1 for what failed below (disk, memory,
    a library), 75 for another process of the run that does not answer, 130 for Ctrl-C, 143 for SIGTERM. A failure is
    one line; DEEPSEEK_DEBUG=1 shows its traceback instead."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what may come next
        import argcomplete

        for name in {*os.environ.get("COMP_LINE", "").split()} & {*COMMANDS}:  # it looks at flags before they are used
            parser.commands[name].filled()
        argcomplete.autocomplete(parser)
    usual, warnings.showwarning = warnings.showwarning, _show_warning
    try:
        args = parser.parse_args(words)
        args.words = words
        if not hasattr(args, "run"):
            args.usage()
            return 2
        with contextlib.nullcontext() if args.command == "serve" else handled(hard=True):
            apply_device(args)
            args.run(args)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt as error:
        with contextlib.suppress(OSError):
            for note in getattr(error, "__notes__", ()):
                print(f"deepseek: stopped: {note}\nresume: {shlex.join(['deepseek', *words])}", file=sys.stderr)
        return 128 + (error.number if isinstance(error, Stopped) else signal.SIGINT)
    except BrokenPipeError:  # the reader of a pipe has gone, as with `| head`
        sys.stdout = None
        return 0
    except Exception as error:
        if os.environ.get("DEEPSEEK_DEBUG", "0") not in ("", "0"):
            raise
        try:
            sys.stdout.flush()
        except (OSError, ValueError):  # a full disk: Python's exit would try, and fail, once more
            sys.stdout = None
        with contextlib.suppress(OSError):
            print(f"deepseek: {_one_line(error)}", file=sys.stderr)
        return error.status if isinstance(error, MoEDRError) else 1
    finally:
        warnings.showwarning = usual


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None,
                  line: str | None = None) -> None:
    """Ours are for the user; a library's says where it comes from."""
    where = "" if issubclass(category, (UserWarning, FutureWarning)) and f"{os.sep}deepseek{os.sep}" in filename else (
        f" ({category.__name__}, {filename}:{lineno})")
    print(f"deepseek: warning: {message}{where}", file=file or sys.stderr)


def _one_line(error: Exception) -> str:
    """What a failure says to a user. Mistakes of our own are marked, since these want their traceback."""
    if isinstance(error, MoEDRError):
        return printable(str(error))
    said = printable(" ".join(str(error).split()))
    said = said if len(said) <= 1000 else f"{said[:1000]} …"
    kind = type(error)
    if isinstance(error, MemoryError) or "OutOfMemory" in kind.__name__ or (
            isinstance(error, RuntimeError) and ("not enough memory" in said or "allocate memory" in said)):
        return f"not enough memory{': ' if said else ''}{said}"
    if isinstance(error, RecursionError):
        return "the input is nested too deeply"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__.partition('.')[0]}: {kind.__name__}"
    return f"{name}{': ' if said else ''}{said} (DEEPSEEK_DEBUG=1 shows where)"


def infer_main() -> int:
    """`deepseek-infer …` is `deepseek infer …`."""
    return main(["infer", *sys.argv[1:]])


def make_parser() -> Parser:
    """The parser of all commands; one that is used takes its flags from its module."""
    parser = Parser(prog="deepseek", description="MoE-DR: an open implementation of the DeepSeek-V3 system",
                    epilog="`deepseek COMMAND --help` lists a command's flags. --a_flag may be spelled --a-flag.")
    parser.add_argument("--version", action="version", version=f"moe-dr {__version__}")
    parser.set_defaults(usage=parser.print_help)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name, text in COMMANDS.items():
        parser.commands[name] = add_command(commands, name, None, text)
        parser.commands[name].fill = partial(_fill, name)
    return parser


def _fill(name: str, parser: Parser) -> None:
    module = import_module(f".{name}", __package__)
    if hasattr(module, "run"):  # others have steps, each with a function of its own
        parser.set_defaults(run=module.run)
    module.add_flags(parser)
