"""`deepseek eval`: a model on the tasks of lm-evaluation-harness, alone or beside another."""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engine.options import EngineOptions
from ..errors import ConfigError
from ..evaluate.options import EvalOptions
from ..interrupts import kept
from .common import MachineOptions, ModelOptions, add_engine_flags, make_llm, named_adapters
from .parser import Parser, add_settings, given_settings, make


@dataclass(frozen=True)
class Candidate:
    """A model to be evaluated. out: the file of its results."""

    name: str
    backend: str
    args: argparse.Namespace
    out: Path | None


def add_flags(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a checkpoint folder or a hub id; transformers (--backend hf) "
                        "also runs dense models and .gguf files")
    add_settings(parser, EvalOptions)
    add_engine_flags(parser)


def run(args: argparse.Namespace) -> None:
    options = make(args, EvalOptions)
    if not options.tasks:
        raise ConfigError("tasks: must be given: names of the harness, such as --tasks mmlu,gsm8k")
    candidates = _candidates(args, options)
    from ..checkpoint import resolve
    from ..config import ModelConfig

    try:
        from ..evaluate import runs, tasks
    except ImportError as error:
        raise ConfigError(f"eval: needs lm-evaluation-harness ({error}): pip install 'moe-dr[eval]'") from None

    loaded, results = tasks.load_tasks(options.tasks, options.data, execute_code=options.execute_code), []
    if options.num_fewshot and (
            own := [task.task_name for task in tasks.single(loaded) if task.config.num_fewshot == 0]):
        print(f"num_fewshot: stays 0 for {', '.join(own)}, as these tasks are defined", file=sys.stderr)
    for candidate in candidates:
        if candidate.backend == "engine":
            config = ModelConfig.from_file(resolve(candidate.name))
            context = config.max_position_embeddings
            if options.max_length is not None and options.max_length > context:
                raise ConfigError(f"max_length = {options.max_length}: must be at most the context of "
                                  f"{candidate.name}, {context} tokens")
            tasks.check_answers(loaded, candidate.name, options.max_length or context)
    for candidate in candidates:
        how = "the engine" if candidate.backend == "engine" else "transformers, float32"
        print(f"{candidate.name} ({how})", file=sys.stderr)
        results.append(_evaluate(candidate, options, loaded))
        print(f"{candidate.name}\n{runs.table(results[-1])}", flush=True)
    if options.compare is not None:
        _report_comparison(options, results)
    for candidate in candidates:
        if candidate.out is not None:
            print(f"results: {candidate.out}")


def _candidates(args: argparse.Namespace, options: EvalOptions) -> list[Candidate]:
    """MODEL, and OTHER if there is one, checked as far as that is quick."""
    from ..checkpoint import resolve
    from ..evaluate.backends import backend_of, check_hf
    from ..tokenizer import Tokenizer

    _, named = named_adapters(make(args, ModelOptions).adapter)
    if named:
        raise ConfigError(f"adapter = {next(iter(named))}=…: one model is measured: give the adapter without a name")
    if options.log_samples and options.out is None:
        raise ConfigError("log_samples = True: has a meaning only with out")
    out = None if options.out is None else Path(options.out).expanduser()
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise ConfigError(f"out = {str(out)!r}: must be a file in a folder that exists")
    found = []
    for place, name in enumerate([args.model] if options.compare is None else [args.model, options.compare]):
        last = options.compare is None or place == 1
        backend = backend_of(name, options.backend if last else "auto")
        if backend == "engine" and not Tokenizer.load(resolve(name)).has_chat_template and options.apply_chat_template:
            raise ConfigError(f"apply_chat_template: {name} has no chat template")
        if backend == "hf":
            check_hf()
        own = argparse.Namespace(**vars(args) | {"model": name} | ({"adapter": None} if place else {}))
        path = out if place == 0 or out is None else out.with_name(f"{out.name}.other.json")
        found.append(Candidate(name, backend, own, path))
    engine = {**given_settings(args, ModelOptions), **given_settings(args, EngineOptions)}
    if engine and all(one.backend == "hf" for one in found):
        raise ConfigError(f"{min(engine)} = {engine[min(engine)]}: is for models that the engine runs, not for backend "
                          "= 'hf', which runs them in float32 as transformers does")
    if "chat_template_kwargs" in engine and any(one.backend == "hf" for one in found):
        raise ConfigError("chat_template_kwargs: would change the prompts of one model alone: not with backend = 'hf'")
    return found


def _evaluate(candidate: Candidate, options: EvalOptions, loaded: Sequence[Any]) -> dict[str, Any]:
    from ..evaluate import runs
    from ..evaluate.backends import fingerprint, hf_model
    from ..evaluate.language_model import EngineLM

    llm, answers, model = None, None, make(candidate.args, ModelOptions)
    adapter, _ = named_adapters(model.adapter)
    about = {"pretrained": candidate.name, "backend": candidate.backend, "dtype": "float32"}
    if candidate.out is not None:  # the answers so far, so that the same command goes on
        key = fingerprint(about, model, options.seed, options.max_length, runs.VERSION, model=candidate.name,
                          adapter=adapter)
        answers = candidate.out.with_name(f"{candidate.out.name}.{key}")
    try:
        if candidate.backend == "hf":
            lm = hf_model(candidate.name, make(candidate.args, MachineOptions).device, options.max_length)
        else:
            llm = make_llm(candidate.args)
            about["dtype"] = str(llm.model.compute_dtype or llm.model.lm_head.weight.dtype).removeprefix("torch.")
            lm = EngineLM(llm, seed=options.seed or 0, max_length=options.max_length)
        with contextlib.nullcontext() if answers is None else kept(
                f"the answers so far are kept beside {candidate.out}"):
            results = runs.run_tasks(lm, loaded, options, about, answers)
    finally:
        if llm is not None:
            llm.close()
        gc.collect()  # two models need not be in memory together
    if candidate.out is not None and answers is not None:
        runs.save(results, candidate.out, samples=options.log_samples)
        runs.answers_file(answers).unlink(missing_ok=True)
    return results


def _report_comparison(options: EvalOptions, results: Sequence[dict[str, Any]]) -> None:
    from ..evaluate.comparison import compare
    from ..files import write_json

    found = compare(*results)
    print(found)
    if options.out is not None:
        out = Path(options.out).expanduser()
        write_json(path := out.with_name(f"{out.name}.difference.json"), found.to_dict())
        print(f"difference: {path}")
