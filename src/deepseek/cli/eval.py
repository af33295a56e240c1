"""`deepseek eval`: a model on the tasks of lm-evaluation-harness, alone or beside another."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..evaluate.options import EvalOptions
from .common import MachineOptions, add_engine_flags, make_llm
from .parser import Parser, add_settings, make


def add_flags(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a checkpoint folder or a hub id; with --backend hf also a dense "
                        "model in Hugging Face's layout or a .gguf file")
    add_settings(parser, EvalOptions)
    add_engine_flags(parser)


def run(args: argparse.Namespace) -> None:
    options = make(args, EvalOptions)
    models = [args.model] if options.compare is None else [args.model, options.compare]
    _check(options)
    try:
        from ..evaluate import runs, tasks
    except ImportError as error:
        raise ConfigError(f"eval: needs lm-evaluation-harness ({error}): pip install 'moe-dr[eval]'") from None

    backends = [runs.backend_of(model, options.backend if model is models[-1] else "auto") for model in models]
    loaded = tasks.load_tasks(options.tasks, options.data, execute_code=options.execute_code)
    results, paths = [], _paths(options)
    for place, (model, backend) in enumerate(zip(models, backends, strict=True)):
        print(f"{model}: {'the engine' if backend == 'engine' else 'transformers, float32'}", flush=True)
        results.append(_evaluate(args, options, model, backend, loaded, other=place > 0))
        print(runs.table(results[-1]))
        if paths:
            runs.save(results[-1], paths[place], samples=options.log_samples)
            print(f"results: {paths[place]}")
    if options.compare is not None:
        _report_comparison(options, results)


def _check(options: EvalOptions) -> None:
    if not options.tasks:
        raise ConfigError("tasks: must be given: names of the harness, such as --tasks mmlu,gsm8k")
    for path in _paths(options):
        if path.is_dir() or not path.parent.is_dir():
            raise ConfigError(f"out = {str(path)!r}: must be a file in a folder that exists")


def _paths(options: EvalOptions) -> list[Path]:
    """Files of the results: MODEL's, OTHER's, the difference."""
    if options.out is None:
        return []
    path = Path(options.out).expanduser()
    return [path, path.with_suffix(".other.json"), path.with_suffix(".difference.json")][: 3 if options.compare else 1]


def _evaluate(args: argparse.Namespace, options: EvalOptions, model: str, backend: str, loaded: Sequence[Any],
              other: bool) -> dict[str, Any]:
    from ..evaluate import runs

    about: dict[str, Any] = {"pretrained": model, "backend": backend}
    if backend == "hf":
        if not other and args.adapter:
            raise ConfigError("adapter: is for models that the engine runs")
        lm = runs.hf_model(model, make(args, MachineOptions).device)
        return runs.run_tasks(lm, loaded, options, about | {"dtype": "float32"})
    from ..evaluate.language_model import EngineLM

    own = argparse.Namespace(**vars(args) | {"model": model, "adapter": None if other else args.adapter})
    llm = make_llm(own)
    try:
        about["dtype"] = str(llm.model.compute_dtype or llm.model.lm_head.weight.dtype).removeprefix("torch.")
        return runs.run_tasks(EngineLM(llm, seed=options.seed or 0), loaded, options, about)
    finally:
        llm.close()
        gc.collect()


def _report_comparison(options: EvalOptions, results: Sequence[dict[str, Any]]) -> None:
    from ..evaluate.comparison import compare
    from ..files import write_json

    found = compare(*results)
    print(found)
    if options.out is not None:
        *_, path = _paths(options)
        write_json(path, found.to_dict())
        print(f"difference: {path}")
