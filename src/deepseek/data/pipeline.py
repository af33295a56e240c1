"""Runs all stages of one YAML file into one folder: OUT/validate, dedup, label, split, pack, report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from ..domain import NAMES
from . import stages
from .report import report
from .settings import PipelineConfig
from .stage import Progress, StageResult

ORDER = ("validate", "dedup", "label", "split", "pack", "report")
Note = Callable[[str, int], None]


def run(config: PipelineConfig, progress: Note | None = None) -> Iterator[tuple[str, StageResult]]:
    """Yield (stage, result) in order; stages whose input and settings are unchanged are not run again. progress: called
    with (stage, records so far). Raises what the stages raise."""
    out = Path(config.out)
    places = {name: out / name for name in ORDER}

    def at(name: str) -> Progress | None:
        return None if progress is None else lambda records: progress(name, records)

    names = config.experts or tuple(dict.fromkeys([*NAMES, *filter(None, config.sources)]))
    yield "validate", stages.validate(config.sources, places["validate"], config.validate, experts=names,
                                     mapping=config.map, workers=config.workers, progress=at("validate"))
    yield "dedup", stages.dedup(places["validate"], places["dedup"], config.dedup, workers=config.workers,
                               progress=at("dedup"))
    yield "label", stages.label(places["dedup"], places["label"], config.label, experts=names, workers=config.workers,
                               progress=at("label"))
    yield "split", stages.split(places["label"], places["split"], config.split, progress=at("split"))
    yield "pack", stages.pack(places["split"], places["pack"], config.pack, held_out=config.split,
                             experts=config.experts, progress=at("pack"))
    yield "report", report(places["split"], places["report"])
