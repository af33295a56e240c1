"""What is evaluated, and how: EvalOptions, checked when made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from ..settings import COUNT, NATURAL, Option, Settings, is_int

Backend = Literal["auto", "engine", "hf"]


@dataclass(frozen=True)
class EvalOptions(Settings):
    """Names are the harness' own, where it has the option. Raises ConfigError naming option, value and rule."""

    tasks: Annotated[tuple[str, ...], Option(
        "names of the harness' tasks or groups, with commas or blanks between them", metavar="TASKS")] = ()
    data: Annotated[str | Path | None, Option("local files instead of the hub's: a folder with mmlu, gsm8k, humaneval, "
                                              "mbpp, wikitext2, cmath, aqua, svamp", metavar="DIR")] = None
    limit: Annotated[int | None, Option("the first questions of each task alone; else all", COUNT)] = None
    num_fewshot: Annotated[int | None, Option(
        "examples in front of a question; else the task's own number", NATURAL)] = None
    max_length: Annotated[int | None, Option(
        "tokens that a model sees at a time: longer texts are scored in windows, longer prompts lose their beginning; "
        "else the model's own context", (
            "must be an integer >= 2", lambda v: is_int(v) and v >= 2))] = None
    apply_chat_template: Annotated[bool, Option("put prompts into the model's chat template")] = False
    seed: Annotated[int | None, Option(
        "of the choice of examples and of sampling; else the harness' own (0 and 1234)", NATURAL)] = None
    compare: Annotated[str | None, Option(
        "another model on the same questions: both results, their difference, and the answers that differ: a "
        "checkpoint folder, a hub id or a .gguf file", metavar="OTHER")] = None
    backend: Annotated[Backend, Option(
        "what runs OTHER, or MODEL without --compare: our engine, or hf, the harness' own model class on transformers, "
        "in float32; auto takes hf for architectures that the engine does not run")] = "auto"
    out: Annotated[str | Path | None, Option(
        "save the harness' results; of OTHER in FILE.other.json, the difference in FILE.difference.json",
        metavar="FILE")] = None
    log_samples: Annotated[bool, Option("keep every prompt and answer in the saved results")] = False
    execute_code: Annotated[bool, Option(
        "run the programs that the model writes (HumanEval, MBPP), in a process with limits but without a sandbox; "
        "else they are not scored")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [name for word in self.tasks for name in word.replace(",", " ").split()]
        object.__setattr__(self, "tasks", tuple(dict.fromkeys(names)))
