"""The stages of the pipeline, each from a folder to a folder: validate, dedup, label, split, pack.

    validate  files -> records in Parquet, and quarantine.jsonl with what could not be used and why
    dedup     records -> those that stay, and dropped.csv: which went, why, and for the sake of which
    label     records -> the same with an expert each, where one can be told; the classifier and its held-out report
    split     records -> NAME/train and NAME/valid by expert (`unlabelled` for those without)
    pack      records -> token shards

A stage writes its folder atomically, with a step.json: counts, and a fingerprint of the settings and of the input (for
files: their paths, sizes and times). A folder with the same fingerprint is not written again, so the same command
resumes a stopped pipeline. Every stage keeps the reading order and gives the same records for any number of workers.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..domain import NAMES, DomainClassifier, KeywordRules
from ..files import sha256
from .dedup import find_duplicates
from .held_out import LEAST, count_held, held_out_place, hold_out, notes
from .mapping import RecordMap
from .reader import Named, ReadReport, read_documents
from .records import Parts, read_tables
from .settings import DedupSettings, LabelSettings, PackSettings, SplitSettings, ValidateSettings, check_names
from .stage import Progress, StageResult, input_fingerprint, ordered_map, run_stage
from .validate import read_all, source_fingerprint

if TYPE_CHECKING:
    import polars

BLOCK = 1 << 14
LEAST_TEXTS = 20  # of a name, or the classifier does not learn it
TOKENIZER_CHARACTERS = 50_000_000  # that a tokenizer is trained on at most

def validate(
    paths: Sequence[str | Path] | Named, out: str | Path, settings: ValidateSettings | None = None, *,
    experts: Sequence[str] = (), mapping: RecordMap | None = None, workers: int = 2, progress: Progress | None = None,
) -> StageResult:
    """Read files of every kind into records. experts: names that records may bear; with none given, any will do.

    Raises as `read_documents` does; what it calls a problem goes to quarantine.jsonl, with file, line, reason and the
    record as it stood: {"source", "line", "reason", "detail", "raw"}. read = kept + quarantined.
    """
    settings = settings or ValidateSettings()
    named: Named = paths if isinstance(paths, dict) else {"": paths}  # type: ignore[dict-item]
    check_names(experts, tuple(filter(None, named)))
    given = [source_fingerprint(named), asdict(settings), sorted(experts), asdict(mapping) if mapping else None]
    return run_stage("validate", out, given, lambda folder: read_all(named, folder, settings, experts, mapping, workers,
                                                                    progress))


def dedup(
    source: str | Path, out: str | Path, settings: DedupSettings | None = None, *, workers: int = 2,
    progress: Progress | None = None,
) -> StageResult:
    """Drop exact and near duplicates of earlier records (see dedup.py), and list them in dropped.csv."""
    settings = settings or DedupSettings()

    def work(folder: Path) -> dict[str, Any]:
        import numpy as np
        import polars as pl

        found = find_duplicates(source, near=not settings.exact_only, threshold=settings.threshold, workers=workers,
                                progress=progress)
        stays = found.stays
        parts, at = Parts(folder), 0
        for table in read_tables(source):
            parts.add(table.filter(pl.Series(stays[at : at + len(table)])))
            at += len(table)
        parts.close()
        places = pl.concat(list(read_tables(source, ["source", "line"])))
        gone = np.flatnonzero(~stays)
        kept = places[found.kept_N[gone]].rename({"source": "kept_source", "line": "kept_line"})
        why = pl.DataFrame({"kind": np.where(found.exact_N[gone], "exact", "near"),
                            "similarity": found.similarity_N[gone].round(4)})
        pl.concat([places[gone], why, kept], how="horizontal").write_csv(folder / "dropped.csv")
        exact = int(found.exact_N.sum())
        return {"read": len(stays), "kept": len(stays) - len(gone), "exact": exact, "near": len(gone) - exact,
                "threshold": settings.threshold}

    return run_stage("dedup", out, [input_fingerprint(source), asdict(settings)], work)


def label(
    source: str | Path, out: str | Path, settings: LabelSettings | None = None, *, experts: Sequence[str] = (),
    workers: int = 2, progress: Progress | None = None,
) -> StageResult:
    """Label records with an expert: the given one, else by keyword rules, else by a classifier above `confidence`. The
    column label_source records which. experts: the only names allowed."""
    settings = settings or LabelSettings()
    check_names(experts)
    rules = None if settings.rules == "none" else (
        KeywordRules() if settings.rules == "builtin" else KeywordRules.load(settings.rules))
    ready = None if settings.classifier in ("train", "none") else DomainClassifier.load(settings.classifier)
    check_names(experts, ready.names if ready and experts else ())

    def work(folder: Path) -> dict[str, Any]:
        sample = _labelled_sample(source, settings.texts) if settings.classifier == "train" or rules else {}
        classifier, counts = ready, dict[str, Any]()
        if settings.classifier == "train":
            classifier, counts["classifier"] = _trained(sample, experts, settings)
        allowed = set(experts or (NAMES if rules is None else rules.keywords) if rules else ())
        if rules:
            counts["rules"] = _tried(rules, sample, allowed)
        if classifier:
            classifier.save(folder / "classifier.npz")

        def name(table: polars.DataFrame) -> polars.DataFrame:
            return _named(table, rules, allowed, classifier, settings.confidence)

        parts, tally, seen = Parts(folder), Counter[tuple[str, str]](), 0
        with ThreadPoolExecutor(workers) as pool:
            for table in ordered_map(pool, name, read_tables(source, rows=BLOCK), workers):
                parts.add(table)
                for who, by, count in table.group_by("expert", "label_source").len().iter_rows():
                    tally[who or "unlabelled", by or "unlabelled"] += count
                seen += len(table)
                if progress is not None:
                    progress(seen)
        parts.close()
        by_source, by_expert = Counter[str](), Counter[str]()
        for (who, by), count in sorted(tally.items()):
            by_source[by] += count
            by_expert[who] += count
        return {"read": seen, "by_source": by_source, "by_expert": by_expert, **counts}

    given = [input_fingerprint(source), asdict(settings), list(experts), rules and rules.fingerprint,
             sha256(Path(settings.classifier)) if ready else None]
    return run_stage("label", out, given, work)


def _labelled_sample(source: str | Path, most: int) -> dict[str, list[str]]:
    """Up to about `most` texts of each given name, chosen by a hash of the text."""
    import polars as pl

    have: Counter[str] = Counter()
    for table in read_tables(source, ["expert"]):
        have.update(dict(table.drop_nulls().group_by("expert").len().iter_rows()))
    sample: dict[str, list[str]] = {name: [] for name in sorted(have)}
    for table in read_tables(source, ["text", "expert"]):
        for text, name in table.filter(pl.col("expert").is_not_null()).iter_rows():
            if have[name] <= most or held_out_place(text, b"sample") < most / have[name]:
                sample[name].append(text)
    return sample


def _trained(
    sample: dict[str, list[str]], experts: Sequence[str], settings: LabelSettings
) -> tuple[DomainClassifier | None, dict[str, Any]]:
    learnt = {name: texts for name, texts in sample.items()
              if len(texts) >= LEAST_TEXTS and (not experts or name in experts)}
    if len(learnt) < 2:
        return None, {"trained": False, "why": f"needs two names with {LEAST_TEXTS} given labels each, there are "
                      + (", ".join(f"{name}: {len(texts)}" for name, texts in sample.items()) or "none")}
    with warnings.catch_warnings():  # what the report says is shown each time, this would be once
        warnings.simplefilter("ignore", UserWarning)
        classifier, report = DomainClassifier.train(
            [text for texts in learnt.values() for text in texts],
            [name for name, texts in learnt.items() for _ in texts], seed=settings.seed)
    return classifier, {
        "trained": True, "texts": {name: len(texts) for name, texts in learnt.items()}, "names": report.names,
        "confusion": report.confusion, "accuracy": report.accuracy, "macro": report.macro,
        "calibration_error": report.calibration_error, "at": {f"{k:.2f}": v for k, v in report.at.items()},
        "coincide": report.coincide}


def _tried(rules: KeywordRules, sample: dict[str, list[str]], allowed: set[str]) -> dict[str, Any]:
    """Coverage and precision of the rules on records whose name is known."""
    out = {}
    for name, texts in sample.items():
        said = [who for text in texts[:1000] if (who := rules.predict(text)) in allowed]
        out[name] = {"texts": len(texts[:1000]), "covered": len(said) / max(1, len(texts[:1000])),
                     "right": said.count(name) / len(said) if said else None}
    return out


def _named(
    table: polars.DataFrame, rules: KeywordRules | None, allowed: set[str], classifier: DomainClassifier | None,
    confidence: float,
) -> polars.DataFrame:
    import polars as pl

    names, sources = table["expert"].to_list(), table["label_source"].to_list()
    sure: list[float | None] = [None] * len(names)
    open_rows = [i for i, name in enumerate(names) if name is None]
    texts = table["text"].gather(open_rows).to_list()
    left = []
    predicted = rules.predict_batch(texts) if rules is not None else [None] * len(texts)
    for i, text, who in zip(open_rows, texts, predicted, strict=True):
        if who in allowed:
            names[i], sources[i] = who, "rules"
        else:
            left.append((i, text))
    if classifier is not None and left:
        said_N, sure_N = classifier.predict([text for _, text in left])
        for (i, _), said, p in zip(left, said_N, sure_N.tolist(), strict=True):
            sure[i] = p
            if p >= confidence:
                names[i], sources[i] = said, "classifier"
    return table.with_columns(pl.Series("expert", names, pl.String), pl.Series("label_source", sources, pl.String),
                              pl.Series("confidence", sure, pl.Float32))


def split(source: str | Path, out: str | Path, settings: SplitSettings | None = None, *,
          progress: Progress | None = None) -> StageResult:
    """Write records by expert into OUT/NAME/train and OUT/NAME/valid. A hash of the text decides, and at least a few of
    every name are held out, as in `pack`."""
    settings = settings or SplitSettings()

    def work(folder: Path) -> dict[str, Any]:
        import numpy as np
        import polars as pl

        key, seen = f"{settings.seed}".encode(), 0
        numbers: dict[str | None, int] = {}
        columns = [(np.array([held_out_place(text, key) for text in table["text"]], float),
                    np.array([numbers.setdefault(name, len(numbers)) for name in table["expert"]], int),
                    table["text"].str.len_chars().to_numpy())
                   for table in read_tables(source, ["text", "expert"])] or [(np.zeros(0),) * 3]
        place_N, name_N, size_N = (np.concatenate(column) for column in zip(*columns, strict=True))
        held_N = hold_out(place_N, name_N, size_N, settings.valid_fraction)[0]
        parts: dict[tuple[str, str], Parts] = {}
        for table in read_tables(source):
            side = pl.Series("side", np.where(held_N[seen : seen + len(table)], "valid", "train"))
            groups = table.with_columns(side).partition_by("expert", "side", as_dict=True, include_key=True,
                                                           maintain_order=True)
            for (name, side), part in groups.items():
                where = str(name or "unlabelled"), str(side)
                if where not in parts:
                    parts[where] = Parts(folder / where[0] / where[1])
                parts[where].add(part.drop("side"))
            seen += len(table)
            if progress is not None:
                progress(seen)
        for writer in parts.values():
            writer.close()
        named = {number: name or "unlabelled" for name, number in numbers.items()}
        held = count_held(place_N, name_N, held_N, [], settings.valid_fraction, named)
        return {"read": seen, "valid_fraction": settings.valid_fraction, "seed": settings.seed,
                "notes": notes(held, settings.valid_fraction, "records"),
                "by_expert": {name: {side: parts[name, side].rows if (name, side) in parts else 0
                                     for side in ("train", "valid")} for name in sorted({n for n, _ in parts})}}

    return run_stage("split", out, [input_fingerprint(source), asdict(settings), LEAST], work)


def pack(
    source: str | Path, out: str | Path, settings: PackSettings | None = None, *, held_out: SplitSettings | None = None,
    experts: Sequence[str] = (), mapping: RecordMap | None = None, progress: Progress | None = None,
) -> StageResult:
    """Write records as token shards for training. held_out: as in `split`. experts: names in the order of the routing
    groups; by default those of the records, sorted. mapping: `source` is files or a folder as `validate` takes them,
    and this says what their columns are. A tokenizer trained here is written to OUT/tokenizer."""
    settings, held_out = settings or PackSettings(), held_out or SplitSettings()

    def tables(columns: Sequence[str], report: ReadReport | None = None) -> Iterator[polars.DataFrame]:
        if mapping is None:
            return read_tables(source, columns)
        from . import shards

        return shards.document_tables(read_documents([source], report or ReadReport(), mapping))

    def work(folder: Path) -> dict[str, Any]:
        from ..tokenizer import Tokenizer
        from . import shards

        names = experts or sorted({name for table in tables(["expert"])
                                   for name in table["expert"].drop_nulls().unique()})
        if settings.tokenizer:
            tokenizer = Tokenizer.load(settings.tokenizer)
        else:
            tokenizer = Tokenizer.train(_some_texts(tables(["text"])), settings.vocab_size)

        report = ReadReport()
        packed = shards.pack_tables(
            tables(shards.PACKED, report), tokenizer, folder, valid_fraction=held_out.valid_fraction,
            seed=held_out.seed, experts=names, report=report,
            progress=progress and (lambda records, _: progress(records)))
        if not settings.tokenizer:
            tokenizer.save(folder / "tokenizer")
        return {"records": packed.about["documents"], "train_tokens": packed.train_tokens,
                "valid_tokens": packed.valid_tokens, "experts": list(names), "refused": len(report.problems),
                "tokenizer": tokenizer.fingerprint, "notes": packed.notes()}

    given = [input_fingerprint(source) if mapping is None else [source_fingerprint({"": [source]}), asdict(mapping)],
             asdict(settings), asdict(held_out), list(experts), LEAST]
    if settings.tokenizer:
        from ..tokenizer import Tokenizer

        given.append(Tokenizer.load(settings.tokenizer).fingerprint)
    return run_stage("pack", out, given, work)


def _some_texts(tables: Iterable[polars.DataFrame]) -> Iterator[str]:
    characters = 0
    for table in tables:
        for text in table["text"]:
            yield text
            characters += len(text)
            if characters > TOKENIZER_CHARACTERS:
                return
