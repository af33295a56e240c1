"""A document, and tables of documents: the Parquet files between the stages of the pipeline.

    text, answer_at, turns (JSON)    what is learnt; offset of the answer; (role, text) pairs of a conversation
    source, line                     where it comes from
    expert, label_source, confidence its name, who says so (given, rules, classifier), and how sure the classifier is
    language, complexity             as the metadata say, else the language is judged by its script and stop words
    metadata (JSON)                  the rest of what the record said about itself
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, NotFoundError
from ..files import to_json
from .turns import Turns

if TYPE_CHECKING:
    import polars

COLUMNS = {"text": "String", "answer_at": "Int64", "turns": "String", "source": "String", "line": "Int64",
           "expert": "String", "label_source": "String", "confidence": "Float32", "language": "String",
           "complexity": "String", "metadata": "String"}
PART_ROWS = 1 << 16
ENGLISH = [" the ", " of ", " and ", " to ", " is ", " in ", " a ", " you ", "The ", "What ", "How "]


@dataclass(frozen=True)
class Document:
    """One text. turns: (role, text) of a conversation (`conversation.to_turns`); `text` is its plain form.
    expert: the name of the experts that it is for. response_start (column `answer_at`): offset in `text` where the
    answer begins, after the newline; None where there is no answer, or there are several."""

    text: str
    source: str
    line: int | None = None
    turns: Turns = ()
    expert: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    response_start: int | None = None


def to_table(documents: Iterable[Document]) -> polars.DataFrame:
    """Make a table of documents, in their order."""
    import polars as pl

    rows = [(d.text, d.response_start, to_json(d.turns, ensure_ascii=False) if d.turns else None, d.source, d.line,
             d.expert, "given" if d.expert else None, None, _word(d.metadata.get("language")),
             _word(d.metadata.get("complexity")),
             to_json(d.metadata, ensure_ascii=False, default=str) if d.metadata else None) for d in documents]
    columns = zip(*rows, strict=True) if rows else ([] for _ in COLUMNS)
    table = pl.DataFrame([pl.Series(name, values, dtype=getattr(pl, kind), strict=False)
                          for (name, kind), values in zip(COLUMNS.items(), columns, strict=True)])
    return table.with_columns(language=pl.coalesce("language", _judged()))


def to_documents(table: polars.DataFrame) -> Iterator[Document]:
    """Iterate over the documents of a table of records."""
    for text, response_start, turns, source, line, expert, metadata in table.select(
            "text", "answer_at", "turns", "source", "line", "expert", "metadata").iter_rows():
        yield Document(text, source, line, tuple((role, said) for role, said in json.loads(turns)) if turns else (),
                       expert, json.loads(metadata) if metadata else {}, response_start)


def record_files(folder: str | Path) -> list[Path]:
    """List the Parquet files of a stage's folder, in order, deeper folders included."""
    found = sorted(Path(folder).rglob("*.parquet")) if Path(folder).is_dir() else []
    if not found:
        raise NotFoundError(f"{folder}: holds no records (*.parquet); `deepseek data validate` makes them")
    return found


def read_tables(
    folder: str | Path, columns: Sequence[str] = tuple(COLUMNS), rows: int = PART_ROWS
) -> Iterator[polars.DataFrame]:
    """Read the records of a folder in tables of at most `rows`. Raises NotFoundError where there is none, DataError for
    a file that is not of this kind."""
    import polars as pl

    for path in record_files(folder):
        try:
            table = collect(pl.scan_parquet(path).select(columns))
        except (pl.exceptions.PolarsError, OSError) as error:
            raise DataError(f"{path}: not a table of records: {' '.join(str(error).split())}") from None
        yield from table.iter_slices(rows)


def collect(table: polars.LazyFrame) -> polars.DataFrame:
    """Compute a lazy table on a thread of its own. The caller may be a worker of the tokenizer library,
    which asks for the next text under a lock; a worker that waits for polars itself would take up other work of its
    own meanwhile, and wait for that lock forever."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(table.collect).result()


class Parts:
    """Writes tables as part-00000.parquet, … of about PART_ROWS records each."""

    def __init__(self, folder: Path, prefix: str = "part") -> None:
        self.folder, self.prefix = folder, prefix
        self.waiting: list[polars.DataFrame] = []
        self.files = self.rows = 0

    def add(self, table: polars.DataFrame) -> None:
        self.waiting.append(table)
        self.rows += len(table)
        if sum(map(len, self.waiting)) >= PART_ROWS:
            self.close()

    def close(self) -> None:
        """Write the tables that are not written yet."""
        import polars as pl

        if any(map(len, self.waiting)):
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{self.prefix}-{self.files:05d}.parquet"
            pl.concat(self.waiting).write_parquet(path, compression="zstd", compression_level=1)
            self.files += 1
        self.waiting = []


def _word(value: Any) -> str | None:
    return str(value) if value else None


def _judged() -> polars.Expr:
    """zh, ja, ko by script, en by its commonest words, else `other`; by the beginning of the text."""
    import polars as pl

    head = pl.col("text").str.slice(0, 400)
    return (pl.when(head.str.contains(r"[\u3040-\u30ff]")).then(pl.lit("ja"))
            .when(head.str.contains(r"[\uac00-\ud7af]")).then(pl.lit("ko"))
            .when(head.str.contains(r"[\u4e00-\u9fff]")).then(pl.lit("zh"))
            .when(head.str.contains_any(ENGLISH)).then(pl.lit("en")).otherwise(pl.lit("other")))
