"""Files -> documents, within limits.

What others wrote may be made to break the program that reads it: a PDF that unpacks to gigabytes, HTML that nests
without end. So PDF and HTML are parsed by a worker process, whose time and memory are limited, and so is text of more
than a megabyte; smaller text and Markdown are parsed here, which takes time and memory in proportion to their size.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError, MoEDRError, NotFoundError, shown
from ..workers import WorkerError, Workers, serve
from .documents import KINDS, Block, Document, is_pdf, parse

BYTES = 100 << 20  # of a file, and characters of its text, at most
PARTS = 1_000_000  # paragraphs and headings of a file, at most
HERE = 1 << 20  # bytes of text or Markdown that are parsed in this process
SECONDS, MEMORY = 30.0, 2 << 30  # of processor time for a worker, and bytes
PACE = {"pdf": 50_000}  # bytes for a second more
WORKERS = Workers(__name__, kept=1)
_ERRORS: dict[str, type[MoEDRError]] = {error.__name__: error for error in (ConfigError, DataError, NotFoundError)}


def checked(path: Path, most: int | None = BYTES) -> os.stat_result:
    """The state of a file. Raises NotFoundError, and DataError for what is no regular file or has more than `most`
    bytes."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise NotFoundError(f"{path}: no such file") from None
    except OSError as error:  # links in a circle, say
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    if stat.S_ISDIR(found.st_mode):
        raise DataError(f"{path}: is a folder: name its files")
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{path}: must be a file")  # a pipe would be waited for
    if most is not None and found.st_size > most:
        raise DataError(f"{path}: has {found.st_size:,} bytes: must be at most {most:,}: divide it")
    return found


def resolved(files: Iterable[str | Path]) -> list[Path]:
    """Each file once, behind its links. Raises NotFoundError and DataError for what cannot be read."""
    paths: dict[Path, None] = {}
    for file in [files] if isinstance(files, str | Path) else files:
        path = Path(file).expanduser()
        checked(path, most=None)
        paths[path.resolve()] = None
    return list(paths)


def read_document(path: str | Path, encoding: str = "utf-8") -> Document:
    """Read a file; its name tells what it is, and everything else is text. encoding: of files that do not say theirs.

    Raises NotFoundError; DataError (with the file and the mistake) for a folder, a file without text, a broken, a
    binary or too large one, and one that takes too long or too much memory; and ConfigError where the library for it
    is not installed or there is no such encoding.
    """
    path = Path(path)
    size = checked(path).st_size
    kind = KINDS.get(path.suffix.lower(), "text")
    if size <= HERE and kind in ("text", "markdown") and not is_pdf(data := _bytes(path)):
        return parse(data, kind, str(path), encoding)
    seconds = SECONDS + size / PACE.get(kind, 1_000_000)
    try:
        answer = WORKERS.ask({"path": str(path.absolute()), "name": str(path), "kind": kind, "encoding": encoding},
                             seconds=seconds, memory=MEMORY)
    except WorkerError as ended:
        raise DataError(f"{path}: takes more than {ended.seconds:,.0f} seconds to read" if ended.late else
                        f"{path}: ended the process that read it (status {ended.status})") from None
    if "limit" in answer:
        raise DataError(f"{path}: {answer['limit']}")
    if "error" in answer:
        raise _ERRORS[answer["error"]](answer["said"])
    titles = [tuple(one) for one in answer["titles"]]
    return Document(answer["kind"], answer["text"], [Block(start, end, titles[one], heading)
                                                     for start, end, one, heading in answer["blocks"]])


def _bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(BYTES)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def work() -> None:
    """A worker: files in, their documents out."""
    serve(_answer)


def _answer(asked: dict[str, Any]) -> dict[str, Any]:
    try:
        found = parse(_bytes(Path(asked["path"])), asked["kind"], asked["name"], asked["encoding"])
        for count, most, what in ((len(found.text), BYTES, "characters"), (len(found.blocks), PARTS, "paragraphs")):
            if count > most:
                return {"limit": f"its text has {count:,} {what}: must be at most {most:,}: divide it"}
        titles: dict[tuple[str, ...], int] = {}
        blocks = [(block.start, block.end, titles.setdefault(block.titles, len(titles)), block.heading)
                  for block in found.blocks]
        return {"kind": found.kind, "text": found.text, "titles": [*titles], "blocks": blocks}
    except MemoryError:
        return {"limit": f"takes more than {MEMORY >> 20:,} MiB of memory to read"}
    except MoEDRError as error:
        return {"error": type(error).__name__, "said": str(error)}
    except Exception as error:  # a mistake of a parser's own
        return {"error": "DataError", "said": f"{asked['name']}: cannot be read: {type(error).__name__}: "
                                              f"{shown(str(error), 120)}"}
