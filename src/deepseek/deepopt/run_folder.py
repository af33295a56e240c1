"""The folder of a run: which run it holds, its checkpoints, its log (loop.py lists the files)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError
from ..files import is_file_at, to_json, write_atomically
from ..settings import is_number
from .settings import LAYOUT, ONLY_WITH, SCHEDULE, Leg, TrainConfig, only_with

CHECKPOINT = "checkpoint-{:06d}"
SETTINGS = "settings.json"


def run_in(out: Path) -> dict[str, Any] | None:
    """What settings.json says of the run in `out`, less an extension that has not begun; None where there is none."""
    path = out / SETTINGS
    if not path.is_file():
        return None
    settings = json.loads(path.read_text(encoding="utf-8"))
    # an older version had fewer settings, or kept some where they had no meaning
    settings["train"] = train = asdict(TrainConfig()) | {
        name: value for name, value in settings["train"].items() if value is not None}
    for setting in ONLY_WITH:
        train |= {name: None if default is None else train[name]
                  for name, default in only_with(setting, train[setting]).items()}
    if "general" in (chosen := settings.get("chosen", {})):  # its name in 0.1
        chosen["retain_data"] = chosen.pop("general")
    legs = settings.get("legs", [])
    if legs and (not (found := checkpoints(out)) or step_of(found[-1]) <= legs[-1]["steps"]):
        settings["train"] |= legs[-1]
        settings["legs"] = legs[:-1]
    return settings


def refuse_other_run(
    out: Path, settings: Mapping[str, Mapping[str, Any]], *, whole: bool = True, extend: bool = True
) -> list[dict[str, Any]]:
    """The legs of the run in `out` before the one that `settings` describe. Raises ConfigError where `out` holds a run
    with other settings, by part and key. whole: these are all settings, so one that only the run has counts too.
    extend: more steps, with whatever schedule, are a further leg."""
    if (old := run_in(out)) is None:
        return []
    new = json.loads(json.dumps(settings))
    before, steps = old["train"]["steps"], new["train"]["steps"]
    longer = extend and steps > before
    if extend and steps < before:
        raise ConfigError(f"steps = {steps}: {out} holds a run of {before} steps, which can grow, not shrink; choose "
                          "another --out or remove the folder")
    for part in new:
        known = old.get(part, {})
        keys = set(new[part]) | (set(known) if whole else set())
        for key in sorted(keys, key=lambda key: (key not in ONLY_WITH, key)):
            if known.get(key) != new[part].get(key) and not (longer and key in SCHEDULE) and key not in LAYOUT:
                raise ConfigError(f"{out} holds a run with {key} = {known.get(key)!r}, this one has "
                                  f"{new[part].get(key)!r}; choose another --out or remove the folder")
    return [*old.get("legs", []), *([{field.name: old["train"][field.name] for field in fields(Leg)}]
                                    if longer else [])]


def kept_in(out: Path) -> str:
    """Describe what a stopped run leaves in `out`."""
    run, found = run_in(out), checkpoints(out)
    if run is None or not found:
        return f"no step is finished, so nothing is kept but what lies prepared in {out}"
    step, steps = step_of(found[-1]), run["train"]["steps"]
    return (f"step {step} of {steps} is saved in {found[-1]}, the run goes on from there" if step < steps else
            f"all {steps} steps are saved in {found[-1]}, the result is still to be written")


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(out: Path) -> list[Path]:
    """The checkpoint folders under `out`, oldest first."""
    return sorted(path for path in out.glob("checkpoint-[0-9]*") if path.is_dir())


class NoLog:
    """The log of a rank that does not write."""

    evaluated = True

    def write(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class RunLog:
    """log.jsonl: one line a record, flushed at once; TensorBoard events beside it if asked."""

    def __init__(self, out: Path, step: int, tensorboard: bool) -> None:
        self._path = path = out / "log.jsonl"
        taken = [(record, line) for record, line in read_log(path) if record["step"] <= step]
        self.evaluated = bool(taken) and "loss" not in taken[-1][0]  # the last step
        write_atomically(path, "".join(line for _, line in taken))
        self._file = path.open("a", encoding="utf-8")
        self._board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ConfigError("tensorboard = True: needs the package tensorboard "
                                  "(pip install 'moe-dr[tensorboard]')") from None
            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(to_json(record) + "\n")
        self._file.flush()
        if not is_file_at(self._file, self._path):
            raise ConfigError(f"{self._path}: was deleted or replaced during the run; the same command goes on from "
                              "what is left")
        if self._board is not None:
            for key, value in scalars(record):
                self._board.add_scalar(key, value, record["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """What TensorBoard can draw of a record: its numbers, a table's as NAME/KEY, of a list how long it is."""
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from scalars({f"{key}/{name}": one for name, one in value.items()})
        elif isinstance(value, list):
            yield key, len(value)
        elif key != "step" and is_number(value):
            yield key, value


def read_log(path: Path) -> list[tuple[dict[str, Any], str]]:
    """(record, line) of every whole line; a last line torn by a kill is dropped."""
    if not path.exists():
        return []
    out = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        try:
            out.append((json.loads(line), line))
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{path}: line {len(out) + 1} is not JSON: {error}") from None
    return out
