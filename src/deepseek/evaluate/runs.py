"""A model on tasks -> the harness' results."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lm_eval.api.model
import lm_eval.api.task
import lm_eval.evaluator
import sqlitedict
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table

from ..files import to_json, write_atomically
from .options import EvalOptions

VERSION = version("lm-eval")
SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234, "fewshot_random_seed": 1234}


def run_tasks(lm: Any, tasks: Sequence[Any], options: EvalOptions, about: Mapping[str, Any],
              answers: Path | None = None) -> dict[str, Any]:
    """The harness' results, with samples. about: what they say of the model. answers: a file that keeps the model's
    answers as they come; those that are in it already are not asked for again."""
    seeds = SEEDS if options.seed is None else dict.fromkeys(SEEDS, options.seed)
    with _quiet(), patch.object(sqlitedict, "SqliteDict", _Answers):
        return lm_eval.evaluator.simple_evaluate(
            lm, model_args=dict(about), tasks=list(tasks), num_fewshot=options.num_fewshot, limit=options.limit,
            apply_chat_template=options.apply_chat_template, confirm_run_unsafe_code=options.execute_code,
            use_cache=None if answers is None else str(answers), task_manager=TaskManager(include_defaults=False),
            **seeds)


def answers_file(answers: Path) -> Path:
    """The file that the harness makes of the name."""
    return Path(f"{answers}_rank0.db")


def table(results: Mapping[str, Any]) -> str:
    """The results in Markdown, as the harness prints them; groups in a table of their own."""
    unscored = [task for task, figures in results["results"].items() if any("bypass" in key for key in figures)]
    scored = {task: figures for task, figures in results["results"].items() if task not in unscored}
    parts = [make_table({**results, "results": scored})] if scored else []
    parts += [make_table(results, "groups")] if results.get("groups") else []
    parts += [f"{task}: the programs were not run, so there is no score (--execute_code runs them)"
              for task in unscored]
    return "\n".join(parts)


def save(results: Mapping[str, Any], path: Path, *, samples: bool) -> None:
    """The harness' results as JSON. samples: with every prompt and answer."""
    kept = {key: value for key, value in results.items() if samples or key != "samples"}
    write_atomically(path, to_json(kept, indent=2, ensure_ascii=False, default=handle_non_serializable) + "\n")


class _Answers(sqlitedict.SqliteDict):
    """The harness' file of answers, in JSON: its own are pickles, which execute code when they are read."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, encode=to_json, decode=json.loads, **kwargs)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars but those of the model: MMLU alone would have 57 others."""
    def same(items: Any, **_: Any) -> Any:
        return items

    with (patch.object(lm_eval.api.task, "tqdm", same, create=True),
          patch.object(lm_eval.api.model, "tqdm", same, create=True)):
        yield
