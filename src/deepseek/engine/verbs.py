"""`deepseek infer` and `deepseek chat`: their flags, and what they say to LLM. Nothing heavy: `--help` loads it."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..conversation import template_variables
from ..errors import ConfigError, RequestError

if TYPE_CHECKING:
    from .llm import LLM
    from .sampler import SamplingParams

COMMANDS = "/reset forgets the conversation, /experts shows who answered, /exit (or Ctrl-D) ends it"  # of chat


def add_infer_flags(verb: argparse.ArgumentParser) -> None:
    _add_model_flags(verb)
    verb.add_argument("--prompt", help="the prompt; else standard input")
    verb.add_argument("--chat", action="store_true", help="put the prompt into the chat template")
    verb.add_argument("--parse_special", action="store_true",
                      help="control tokens spelled out in a prompt count as such (a template of one's own, FIM)")
    verb.add_argument("--input", metavar="JSONL", help="prompts, one object a line: {prompt | messages, id, …}")
    verb.add_argument("--output", metavar="JSONL", help="answers to --input, in its order; gone on with if it exists")
    verb.add_argument("--json_schema", metavar="FILE", help="a JSON schema that the text must match")


def add_chat_flags(verb: argparse.ArgumentParser) -> None:
    _add_model_flags(verb)
    verb.add_argument("--system", help="system message")


def _add_model_flags(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--model", required=True, help="a checkpoint folder or a hub id")
    add_engine_flags(verb)
    verb.add_argument("--use_adapter", metavar="NAME", help="which of the adapters with names answers; else the base")
    _add_sampling_flags(verb)


def add_engine_flags(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--adapter", nargs="+", action="extend", default=[], metavar="[NAME=]DIR",
                      help="a delta or an adapter that `deepseek tune` left, to put in; with names, LoRA adapters "
                      "beside the base, of which each request goes through one or none")
    verb.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    verb.add_argument("--chat_template_kwargs", type=template_variables, metavar="JSON",
                      help="variables of the chat template, such as '{\"thinking\": true}'")
    verb.add_argument("--batch_size", type=int, default=32, help="requests that run together at most")
    verb.add_argument("--step_tokens", type=int, default=512, help="tokens of a step; longer prompts go in pieces")
    verb.add_argument("--policy", choices=("fcfs", "expert"), default="fcfs",
                      help="which waiting request is next: the first, or the one whose experts are in use")
    verb.add_argument("--expert_memory", metavar="SIZE",
                      help="memory for routed experts of a quantized model, such as 4GiB; the others stay on disk")
    verb.add_argument("--warmup_experts", default="", metavar="NAMES",
                      help="names, or auto (those of recorded use), in memory before the first request")
    verb.add_argument("--no_prefetch", action="store_true", help="do not read the next layer's experts ahead")


def _add_sampling_flags(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--max_tokens", type=int, default=256, help="tokens to generate at most")
    verb.add_argument("--temperature", type=float, default=0.6, help="0 is greedy")
    verb.add_argument("--top_p", type=float, default=0.95, help="keep the likeliest tokens up to this probability mass")
    verb.add_argument("--top_k", type=int, default=0, help="keep this many tokens; 0 keeps all")
    verb.add_argument("--min_p", type=float, default=0.0, help="drop tokens below this share of the likeliest one")
    verb.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1 discourages what has been said")
    verb.add_argument("--presence_penalty", type=float, default=0.0, help="above 0 discourages what the answer said")
    verb.add_argument("--frequency_penalty", type=float, default=0.0, help="as above, as often as it said it")
    verb.add_argument("--min_tokens", type=int, default=0, help="tokens before which the text does not end")
    verb.add_argument("--seed", type=int, help="makes sampling repeatable")
    verb.add_argument("--stop", action="append", default=[], help="end at this text; may be given several times")
    verb.add_argument("--show_experts", action="store_true", help="print the experts' use, by name and by layer")
    verb.add_argument("--expert_map", metavar="PNG", help="save that table as a heat map")


def infer(args: argparse.Namespace) -> None:
    if (args.input is None) != (args.output is None):
        raise ConfigError("--input and --output: must be given together")
    if args.input is not None:
        if args.prompt is not None or args.chat:
            raise ConfigError("--input: the prompts are in the file; --prompt and --chat do not apply")
        _infer_file(args)
        return
    if args.chat and args.parse_special:
        raise ConfigError("--parse_special: is for raw prompts; with --chat the template writes the control tokens")
    prompt = args.prompt if args.prompt is not None else sys.stdin.read()
    if not prompt:
        raise RequestError("prompt = '': must not be empty (give --prompt or text on standard input)")
    params, llm = _sampling(args), make_llm(args)
    usage = _usage(args, llm)
    for piece in llm.stream([{"role": "user", "content": prompt}] if args.chat else prompt, params, usage=usage,
                            parse_special=args.parse_special, adapter=args.use_adapter):
        print(piece, end="", flush=True)
    print()
    _finish(args, llm, usage)
    if sys.stdout.isatty():  # text in a pipe is the answer alone
        print(f"try:   deepseek infer --model {args.model} --show_experts --prompt '…'" if not args.show_experts else
              f"try:   deepseek serve {args.model}", file=sys.stderr)


def _infer_file(args: argparse.Namespace) -> None:
    from ..progress import ProgressBar
    from .run_batch import check_files, run_file

    source, target = Path(args.input), Path(args.output)
    if source.resolve() == target.resolve():
        raise ConfigError(f"output = {str(target)!r}: must be another file than the input")
    check_files(source, target)  # before a large model is loaded
    params, llm = _sampling(args), make_llm(args)
    usage = _usage(args, llm)
    counters = llm.engine.counters
    with ProgressBar(unit="prompt", desc="infer") as bar:
        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
            elapsed = bar.format_dict["elapsed"]
            bar.set_postfix_str(f"{counters.sampled / elapsed if elapsed else 0:,.0f} tokens/s", refresh=False)

        answered, errors = run_file(llm, source, target, params, show, usage,
                                    parse_special=args.parse_special, adapter=args.use_adapter)
    print(f"{answered:,} answers written to {target}" + (f", {errors:,} of them errors" if errors else ""),
          file=sys.stderr)
    _finish(args, llm, usage)


def chat(args: argparse.Namespace) -> None:
    params, llm = _sampling(args), make_llm(args)
    if llm.tokenizer is None or not llm.tokenizer.has_chat_template:
        raise RequestError(f"{args.model}: has no chat template, so it is a base model, which continues text and does "
                           f"not answer: deepseek infer --model {args.model} --prompt '…'")
    usage = _usage(args, llm, named=True)
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
            print(_experts(llm, usage))
            continue
        if command := re.fullmatch(r"(/[a-z_]+)(\s.*)?", line.strip(), re.IGNORECASE):
            print(f"{command[1]}: no such command; {COMMANDS}", file=sys.stderr)
            continue
        messages.append({"role": "user", "content": line.rstrip("\n")})
        answer = ""
        for piece in llm.stream(messages, params, usage=usage, adapter=args.use_adapter):
            answer += piece
            print(piece, end="", flush=True)
        print()
        messages.append({"role": "assistant", "content": answer})
    if not (args.show_experts or args.expert_map) and llm.engine.atlas is not None and (
            told := usage.named(llm.engine.atlas)):
        print(told, file=sys.stderr)
    _finish(args, llm, usage)


def named_adapters(words: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """(the one without a name, the others by name) of `NAME=DIR` and `DIR`; a word that is a folder has none.

    Raises ConfigError where a word is neither, and for a second one of a name, or without.
    """
    unnamed, named = None, dict[str, str]()
    for word in words:
        name, equals, folder = word.partition("=")
        if not equals or Path(word).expanduser().is_dir():
            if unnamed is not None:
                raise ConfigError(f"adapter = {word!r}: {unnamed} is the model's already; several need names: NAME=DIR")
            unnamed = word
        elif not name or not folder:
            raise ConfigError(f"adapter = {word!r}: must read NAME=DIR, or DIR alone")
        elif name in named:
            raise ConfigError(f"adapter = {word!r}: {name} is {named[name]} already")
        else:
            named[name] = folder
    return unnamed, named


def make_llm(args: argparse.Namespace) -> LLM:
    """The LLM of the engine's flags."""
    from .llm import LLM

    adapter, adapters = named_adapters(args.adapter)
    if (use := getattr(args, "use_adapter", None)) is not None and use not in adapters:
        raise ConfigError(f"use_adapter = {use!r}: must be one of the names given with --adapter NAME=DIR: "
                          f"{', '.join(adapters) or 'there are none'}")
    llm = LLM(args.model, dtype=args.dtype, device=args.device, adapter=adapter, adapters=adapters,
              chat_template_kwargs=args.chat_template_kwargs, batch_size=args.batch_size,
              step_tokens=args.step_tokens, policy=args.policy, expert_memory=args.expert_memory,
              warmup_experts=args.warmup_experts, prefetch=not args.no_prefetch)
    if llm.warmup is not None:
        print(llm.warmup, file=sys.stderr)
    return llm


def _sampling(args: argparse.Namespace) -> SamplingParams:
    from .sampler import SamplingParams

    schema = getattr(args, "json_schema", None)
    try:
        text = None if schema is None else Path(schema).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"json_schema = {schema!r}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"json_schema = {schema!r}: must be UTF-8") from None
    return SamplingParams(max_tokens=args.max_tokens, temperature=args.temperature, top_p=args.top_p, top_k=args.top_k,
                          min_p=args.min_p, repetition_penalty=args.repetition_penalty,
                          presence_penalty=args.presence_penalty, frequency_penalty=args.frequency_penalty,
                          min_tokens=args.min_tokens, seed=args.seed,
                          stop=tuple(args.stop), json_schema=text)


def _usage(args: argparse.Namespace, llm: LLM, named: bool = False) -> Any:
    """Counted for --show_experts and --expert_map, where experts come and go, for the next warm-up, and in any case if
    they are to be `named`."""
    from ..atlas import ExpertUsage

    wanted = (named or args.show_experts or args.expert_map or llm.warmup is not None
              or llm.engine.residency is not None)
    return ExpertUsage(llm.model.config) if wanted else None


def _experts(llm: LLM, usage: Any) -> str:
    """Which experts the tokens visited: by name, where an atlas lies beside the model, then by index."""
    named = "" if llm.engine.atlas is None else usage.named(llm.engine.atlas)
    told = f"{named}\n\n{usage.table()}" if named else usage.table()
    return "\n\n".join([told, *(f"adapter {name}\n{_experts(llm, own)}" for name, own in usage.adapters.items())])


def _finish(args: argparse.Namespace, llm: LLM, usage: Any) -> None:
    if usage is None:
        return
    if llm.warmup is not None:
        print(f"warm-up: {llm.warmup.measured(usage):.1%} measured coverage", file=sys.stderr)
    if llm.engine.residency is not None:
        from ..checkpoint import resolve
        from .residency import report
        from .warmup import record_use

        print(report(llm.engine.residency.stats), file=sys.stderr)
        folder = resolve(args.model)
        try:
            record_use(usage, folder)
        except OSError as error:  # the answers are out, and a shared model may well be read-only
            print(f"the experts' use is not recorded in {folder}: {error.strerror}", file=sys.stderr)
    if args.show_experts or args.expert_map:
        print(_experts(llm, usage), file=sys.stderr)
    if args.expert_map:
        usage.save_heat_map(args.expert_map)
        print(f"heat map: {args.expert_map}", file=sys.stderr)
