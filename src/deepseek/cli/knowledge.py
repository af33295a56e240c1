"""`deepseek knowledge …`: files into knowledge bases, and search in them."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from ..errors import printable
from ..files import to_json
from ..settings import COUNT, Option, Settings
from .parser import Parser, add_command, add_settings, add_steps, make

if TYPE_CHECKING:
    from ..route import KnowledgeBase

_NAME = "of a base in the user's data folder, or a path"


@dataclass(frozen=True)
class AddOptions(Settings):
    encoding: Annotated[str, Option("of text and HTML that do not say theirs")] = "utf-8"
    passage_size: Annotated[int | None, Option(
        "characters of a passage at most, of a new base; 1000 if not given", COUNT)] = None
    embedding: Annotated[str | None, Option(
        "embedding model of a new base, model2vec:MODEL or sentence-transformers:MODEL (a folder or a hub id); else "
        "vectors are fitted on the base", metavar="LIBRARY:MODEL")] = None


@dataclass(frozen=True)
class SearchOptions(Settings):
    top_k: Annotated[int, Option("passages to find", COUNT)] = 3
    mode: Annotated[Literal["hybrid", "rrf", "bm25", "dense"], Option(
        "what they are ranked by: both rankings, their ranks alone, or one of them")] = "hybrid"
    json: Annotated[bool, Option("print a line of JSON a passage")] = False


def add_flags(parser: Parser) -> None:
    steps = add_steps(parser)
    step = add_command(steps, "add", add, "put files into a base, which is made if it is not there")
    step.add_argument("name", metavar="NAME", help=_NAME)
    step.add_argument("files", nargs="+", metavar="FILE", help="text, Markdown, HTML or PDF")
    add_settings(step, AddOptions)
    step = add_command(steps, "list", show, "the bases in the user's data folder, or the files of one")
    step.add_argument("name", nargs="?", metavar="NAME", help=_NAME)
    step = add_command(steps, "remove", remove, "delete a base, or take files out of it")
    step.add_argument("name", metavar="NAME", help=_NAME)
    step.add_argument("files", nargs="*", metavar="FILE", help="files that are in it; without, the whole base goes")
    step = add_command(steps, "search", search, "the passages that fit a question best")
    step.add_argument("name", metavar="NAME", help=_NAME)
    step.add_argument("query", metavar="QUERY", help="a question or words")
    add_settings(step, SearchOptions)


def _base(args: argparse.Namespace) -> KnowledgeBase:
    from ..route import KnowledgeBase

    return KnowledgeBase(args.name)


def add(args: argparse.Namespace) -> None:
    from ..route import KnowledgeBase

    options = make(args, AddOptions)
    base = KnowledgeBase(args.name, passage_size=options.passage_size, embedding=options.embedding)
    done = base.add(args.files, encoding=options.encoding, progress=True)
    files = base.files()
    print(f"{done.new} new, {done.changed} changed, {done.unchanged} unchanged; the base has {len(files):,} files, "
          f"{sum(file.passages for file in files):,} passages\nbase: {base.path}")


def show(args: argparse.Namespace) -> None:
    from ..route import KnowledgeBase, knowledge

    if args.name is None:
        for name in (names := knowledge.names()):
            files = KnowledgeBase(name).files()
            print(f"{name}: {len(files):,} files, {sum(file.passages for file in files):,} passages")
        if not names:
            print(f"{knowledge.folder()}: no knowledge bases", file=sys.stderr)
        return
    for file in _base(args).files():
        print(printable(f"{file.path}: {file.kind}, {file.bytes:,} bytes, {file.passages:,} passages"))


def remove(args: argparse.Namespace) -> None:
    base = _base(args)
    base.remove(args.files)
    if args.files:
        files = base.files()
        print(f"removed; the base has {len(files):,} files, {sum(file.passages for file in files):,} passages")
    else:
        print(f"{base.path}: removed")


def search(args: argparse.Namespace) -> None:
    options = make(args, SearchOptions)
    found = _base(args).search(args.query, options.top_k, mode=options.mode)
    if not found:
        print("no passage has a word of the query", file=sys.stderr)
    for number, passage in enumerate(found, 1):
        if options.json:
            print(to_json(vars(passage), ensure_ascii=False))
            continue
        print(printable(f"[{number}] {passage.citation}  (score {passage.score:.3f})"))
        print("\n".join(f"    {printable(line)}" for line in passage.text.splitlines()) + "\n")
