"""A model on tasks -> the harness' results."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lm_eval.api.task
import lm_eval.evaluator
from lm_eval.utils import handle_non_serializable, make_table

from ..checkpoint import resolve
from ..errors import ConfigError
from ..files import read_json, to_json, write_atomically
from ..settings import Device
from .options import Backend, EvalOptions

FOLDED = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234, "fewshot_random_seed": 1234}
HF_BATCH = 8


def backend_of(model: str | Path, wanted: Backend = "auto") -> Backend:
    """What runs a model: `engine` or `hf`. Raises ConfigError where the engine cannot, and what `resolve` raises."""
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ConfigError(f"{model}: no such file")
        if wanted == "engine":
            raise ConfigError(f"{model}: backend = 'engine': a GGUF file must be upcycled first: deepseek upcycle {model} "
                              "OUT")
        return "hf"
    kind = read_json(resolve(model, weights=False) / "config.json", ConfigError, finite=False).get("model_type")
    ours = str(kind).startswith("deepseek")
    if wanted == "engine" and not ours:
        raise ConfigError(f"{model}: backend = 'engine': the engine runs DeepSeek's architecture, this is {kind!r}")
    return wanted if wanted != "auto" else "engine" if ours else "hf"


def hf_model(model: str | Path, device: Device = "cpu") -> Any:
    """The harness' own class for a model in transformers, in float32. Raises ConfigError without transformers."""
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ConfigError(f"backend = 'hf': needs transformers and accelerate ({error}): pip install "
                          "'moe-dr[eval]'") from None
    path = Path(model).expanduser()
    where = {"pretrained": str(path.parent), "gguf_file": path.name} if path.suffix == ".gguf" else {
        "pretrained": str(resolve(model))}
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return HFLM(**where, dtype="float32", device=device, batch_size=HF_BATCH)


def run_tasks(lm: Any, tasks: Sequence[Any], options: EvalOptions, model_args: dict[str, Any]) -> dict[str, Any]:
    """The harness' results, with samples. model_args: what the results say of the model."""
    seeds = FOLDED if options.seed is None else dict.fromkeys(FOLDED, options.seed)
    with _quiet():
        return lm_eval.evaluator.simple_evaluate(
            lm, model_args=model_args, tasks=list(tasks), num_fewshot=options.num_fewshot, limit=options.limit,
            apply_chat_template=options.apply_chat_template, confirm_run_unsafe_code=options.execute_code,
            task_manager=lm_eval.tasks.TaskManager(include_defaults=False), **seeds)


def table(results: dict[str, Any]) -> str:
    """The results in Markdown, as the harness prints them; groups in a table of their own."""
    shown = {**results, "results": {task: {key: value for key, value in figures.items() if "bypass" not in key}
                                    for task, figures in results["results"].items()}}
    unscored = [task for task, figures in results["results"].items() if any("bypass" in key for key in figures)]
    parts = [make_table(shown), *([make_table(shown, "groups")] if shown.get("groups") else [])]
    parts += [f"{task}: the programs were not run, so there is no score (--execute_code runs them)"
              for task in unscored]
    return "\n".join(parts)


def save(results: dict[str, Any], path: Path, *, samples: bool) -> None:
    """The harness' results as JSON. samples: with every prompt and answer."""
    kept = results if samples else {key: value for key, value in results.items() if key != "samples"}
    write_atomically(path, to_json(kept, indent=2, ensure_ascii=False, default=handle_non_serializable) + "\n")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar for the prompts of each task: MMLU has 57."""
    with patch.object(lm_eval.api.task, "tqdm", lambda items, **_: items):
        yield
