"""Splits a stream of records into rounds; every record is written to disk as it arrives."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..data import Document, ReadReport, RecordMap
from ..errors import DataError
from ..files import to_json, write_atomically
from .records import digest, documents_in


def iter_new(
    stream: Iterable[Any], seen: set[str], refused: Path, check: Callable[[Document], object],
    report: ReadReport | None = None, mapping: RecordMap | None = None
) -> Iterator[Document]:
    """Yield the documents whose text is new, adding their hashes to `seen`. Records that cannot be used (`check` raises
    DataError) are appended to the file `refused`, with the reason."""
    report = report or ReadReport(strict=True)
    for number, record in enumerate(stream, 1):
        try:
            documents = documents_in(record, number, report, mapping)
            for document in documents:
                check(document)
        except DataError as error:
            refused.parent.mkdir(parents=True, exist_ok=True)
            with refused.open("a", encoding="utf-8") as file:
                file.write(_json({"reason": str(error), "record": record}) + "\n")
            continue
        for document in documents:
            if (known := digest(document)) not in seen:
                seen.add(known)
                yield document


def next_round(folder: Path, waiting: Iterator[Document], size: int, seen: set[str]) -> list[Document]:
    """Return `size` documents, or the rest of the stream: first those in the folder, then new ones. Each is written to
    the folder as it arrives, so a killed run loses none."""
    whole, partly = folder / "records.jsonl", folder / "incoming.jsonl"
    if whole.is_file():
        return stored(whole, seen)
    documents = stored(partly, seen) if partly.is_file() else []
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(partly, "".join(map(_line, documents)))  # without a line that a kill has torn
    with partly.open("a", encoding="utf-8") as file:
        for document in itertools.islice(waiting, max(0, size - len(documents))):
            file.write(_line(document))
            file.flush()
            documents.append(document)
    if len(documents) == size:
        partly.rename(whole)
    return documents


def stored(path: Path, seen: set[str]) -> list[Document]:
    """Read what `next_round` wrote, adding the hashes to `seen`. A torn last line is left out."""
    documents = []
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        keys = json.loads(line)
        if "answer_at" in keys:  # of an earlier version
            keys["response_start"] = keys.pop("answer_at")
        documents.append(Document(**keys | {"turns": tuple((role, said) for role, said in keys["turns"])}))
        seen.add(digest(documents[-1]))
    return documents


def _json(value: Mapping[str, Any]) -> str:
    """JSON of anything; a record that has numbers which JSON has not is written as text."""
    try:
        return json.dumps(value, default=str, allow_nan=False)
    except ValueError:
        return json.dumps({key: str(item) for key, item in value.items()}, allow_nan=False)


def _line(document: Document) -> str:
    return to_json(asdict(document), default=str) + "\n"
