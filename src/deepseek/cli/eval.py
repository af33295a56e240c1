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

from ..errors import ConfigError
from ..evaluate.options import EvalOptions
from ..interrupts import kept
from .common import MachineOptions, ModelOptions, add_engine_flags, make_llm
from .parser import Parser, add_settings, make


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
    for candidate in candidates:
        if candidate.backend == "engine":
            config = ModelConfig.from_file(resolve(candidate.name))
            tasks.check_answers(loaded, candidate.name, config.max_position_embeddings)
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
    from ..evaluate.backends import backend_of
    from ..tokenizer import Tokenizer

    out = None if options.out is None else Path(options.out).expanduser()
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise ConfigError(f"out = {str(out)!r}: must be a file in a folder that exists")
    found = []
    for place, name in enumerate([args.model] if options.compare is None else [args.model, options.compare]):
        last = options.compare is None or place == 1
        backend = backend_of(name, options.backend if last else "auto")
        if backend == "engine" and not Tokenizer.load(resolve(name)).has_chat_template and options.apply_chat_template:
            raise ConfigError(f"apply_chat_template: {name} has no chat template")
        if backend == "hf" and place == 0 and make(args, ModelOptions).adapter:
            raise ConfigError("adapter: is for models that the engine runs, not for backend = 'hf'")
        own = argparse.Namespace(**vars(args) | {"model": name} | ({"adapter": None} if place else {}))
        path = out if place == 0 or out is None else out.with_suffix(".other.json")
        found.append(Candidate(name, backend, own, path))
    return found


def _evaluate(candidate: Candidate, options: EvalOptions, loaded: Sequence[Any]) -> dict[str, Any]:
    from ..evaluate import runs
    from ..evaluate.backends import fingerprint, hf_model
    from ..evaluate.language_model import EngineLM

    llm, answers, model = None, None, make(candidate.args, ModelOptions)
    about = {"pretrained": candidate.name, "backend": candidate.backend, "dtype": "float32"}
    if candidate.out is not None:  # the answers so far, so that the same command goes on
        places = (candidate.name, *(word.rpartition("=")[2] for word in model.adapter))
        answers = candidate.out.with_name(f"{candidate.out.name}.{fingerprint(about, model, models=places)}")
    try:
        if candidate.backend == "hf":
            lm = hf_model(candidate.name, make(candidate.args, MachineOptions).device)
        else:
            llm = make_llm(candidate.args)
            about["dtype"] = str(llm.model.compute_dtype or llm.model.lm_head.weight.dtype).removeprefix("torch.")
            lm = EngineLM(llm, seed=options.seed or 0)
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
        path = Path(options.out).expanduser().with_suffix(".difference.json")
        write_json(path, found.to_dict())
        print(f"difference: {path}")
