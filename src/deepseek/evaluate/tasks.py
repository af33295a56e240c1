"""The harness' tasks by name: its own definitions, with data from the hub or from local files (local_data.py), and
three that it does not have, for local files alone."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import datasets
import lm_eval.tasks
from lm_eval.api.group import Group
from lm_eval.tasks import TaskManager

from ..errors import ConfigError, MoEDRError, NotFoundError, nearest
from .execution import CodeEval
from .local_data import READERS, read_splits

FOLDERS = ("mmlu", "gsm8k", "humaneval", "mbpp", "wikitext")  # of the harness' tasks that have local forms
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names of one setting
MAX_NEW = 256  # tokens of an answer where the task does not say


def answer_tokens(settings: Mapping[str, Any]) -> int:
    """How long an answer may be, by a task's generation_kwargs."""
    return int(next((value for name in LENGTHS if (value := settings.get(name)) is not None), MAX_NEW))


def single(loaded: Sequence[Any]) -> list[Any]:
    """The tasks of groups, and those that stand alone."""
    return [task for one in loaded for task in (one.get_all_tasks() if isinstance(one, Group) else [one])]


def check_answers(loaded: Sequence[Any], model: str, context: int) -> None:
    """Raises ConfigError for a task whose answers leave no room in the context of a model."""
    for task in single(loaded):
        if task.OUTPUT_TYPE == "generate_until" and (most := answer_tokens(task.config.generation_kwargs)) >= context:
            raise ConfigError(f"tasks: {task.task_name}: answers have {most} tokens: must leave room in the context of "
                              f"{model}, {context} tokens (max_position_embeddings, or max_length)")


def number_in(text: str) -> float | None:
    """The last number of a text."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def score_number(target: str) -> Any:
    """Of a task whose answer is a number: process_results for records with that number under `target`."""
    def process(record: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
        said = number_in(results[0])
        return {"exact_match": float(said is not None and abs(said - float(record[target])) < 1e-6)}

    return process


def _generated(task: str, prompt: str, target: str, stop: str) -> dict[str, Any]:
    return {"task": task, "dataset_path": task, "test_split": "test", "output_type": "generate_until",
            "doc_to_text": prompt, "doc_to_target": f"{{{{{target}}}}}", "process_results": score_number(target),
            "generation_kwargs": {"until": [stop, "\n\n"], "max_gen_toks": 256, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
            "num_fewshot": 0, "metadata": {"version": 1.0}}


OWN: dict[str, dict[str, Any]] = {
    "cmath": _generated("cmath", "问题：{{input}}\n答案：", "golden", "问题："),
    "svamp": _generated("svamp", "Question: {{Body.rstrip(' .')}}. {{Question}}\nAnswer:", "Answer", "Question:"),
    "aqua": {
        "task": "aqua", "dataset_path": "aqua", "test_split": "test", "fewshot_split": "validation",
        "fewshot_config": {"sampler": "first_n"}, "output_type": "multiple_choice",
        "doc_to_text": "{{question.strip()}}\n{% for choice in choices %}{{'ABCDE'[loop.index0]}}. {{choice}}\n"
                       "{% endfor %}Answer:",
        "doc_to_choice": ["A", "B", "C", "D", "E"], "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0}}}


def load_tasks(names: Sequence[str], data: str | Path | None, *, execute_code: bool = False) -> list[Any]:
    """The tasks and groups of these names, with their data.

    Without execute_code, tasks that run generated code collect the texts and score nothing. Raises ConfigError for a
    name that there is not and for tasks that run such code otherwise than by CodeEval, NotFoundError and DataError
    for data that is missing or broken.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if not names:
        raise ConfigError("tasks: must have one name at least")
    folder = None if data is None else Path(data).expanduser()
    if folder is not None and not folder.is_dir():
        raise NotFoundError(f"data = {str(data)!r}: no such folder")
    root = Path(lm_eval.tasks.__file__).parent
    manager = TaskManager() if folder is None else TaskManager(
        include_path=[root / name for name in FOLDERS], include_defaults=False)
    for name in names:
        if name in OWN and folder is None:
            raise ConfigError(f"tasks: {name}: is not one of the harness' tasks: needs local files (--data)")
        if name not in OWN and name not in manager.all_tasks:
            known = [*manager.all_tasks, *OWN]
            raise ConfigError(f"tasks: {name}: there is no such task{'' if folder is None else ' with local files'}"
                              f"{nearest(name, known)}")
    wanted = [OWN.get(name, name) for name in names]
    with _metrics_are_ours(), (contextlib.nullcontext() if folder is None else
                               patch.object(datasets, "load_dataset", _local(folder))):
        loaded = _load(manager, wanted, ", ".join(names))
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False):
            _limit(task, execute_code)
    inside = {child for children in loaded["group_map"].values() for child in children}
    return [one for name, one in {**loaded["groups"], **loaded["tasks"]}.items() if name not in inside]


def _load(manager: TaskManager, wanted: list[Any], names: str) -> Any:
    try:
        return manager.load(wanted)
    except MoEDRError:
        raise
    except Exception as error:  # the hub's client raises errors of many libraries
        raise ConfigError(f"tasks: {names}: cannot be loaded: {' '.join(str(error).split())[:300]} (without network, "
                          "--data takes local files)") from error


def _local(folder: Path) -> Any:
    """Replaces datasets.load_dataset: the data set from local files."""
    def load_dataset(path: str, name: str | None = None, **_: Any) -> Any:
        if path not in READERS:
            raise ConfigError(f"tasks: the data set {path} cannot be read from local files: leave out --data")
        return datasets.DatasetDict({split: datasets.Dataset.from_list(records)
                                     for split, records in read_splits(folder, path, name).items()})

    return load_dataset


@contextlib.contextmanager
def _metrics_are_ours() -> Iterator[None]:
    """`evaluate.load("code_eval")`, which tasks call when they are loaded, gives CodeEval. The library is loaded for
    other metrics alone: it takes seconds."""
    before = sys.modules.get("evaluate")

    def load(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "code_eval":
            return CodeEval()
        restore()
        return import_module("evaluate").load(name, *args, **kwargs)

    def restore() -> None:
        sys.modules.pop("evaluate", None)
        if before is not None:
            sys.modules["evaluate"] = before

    stand_in = ModuleType("evaluate")
    vars(stand_in)["load"] = load
    sys.modules["evaluate"] = stand_in
    try:
        yield
    finally:
        restore()


def _limit(task: Any, execute_code: bool) -> None:
    """See to it that a task runs generated code only where that is asked for, and only by CodeEval."""
    if callable(task.config.process_results):  # it comes before all metrics, and may run what it likes
        raise ConfigError(f"tasks: {task.task_name}: runs generated code in its own way, not in a process with limits: "
                          "leave it out")
    if not execute_code:
        task.override_metric("bypass")
        task.UNSAFE_CODE = False
        return
    functions = [getattr(one, "__self__", one) for one in task._metric_fn_list.values()]
    if not all(any(isinstance(value, CodeEval) for value in getattr(one, "__globals__", {}).values())
               for one in functions):
        raise ConfigError(f"tasks: {task.task_name}: runs generated code in its own way, not in a process with limits: "
                          "leave out --execute_code")
