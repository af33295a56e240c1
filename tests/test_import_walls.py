"""Who may import whom (docs/house.md), enforced over the syntax tree; no module imports itself by any way round.

Imports inside functions count, and those under TYPE_CHECKING too, because a type is a dependency of thought. Only the
package's own `__init__` may name all rooms there.

Also: what `deepseek --help` loads at import time is checked file by file, so that the answer names the guilty line.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.helpers import ROOT

PACKAGE = ROOT / "src" / "deepseek"

# each may import those before it
BOTTOM = ("deprecation", "errors", "settings", "files", "keys", "memory", "progress", "interrupts", "config", "ids",
          "language", "glossary", "domain", "conversation", "workers", "templates", "grammars", "tiktokens",
          "tokenizer", "spoken", "ops")
ABOVE: dict[str, tuple[str, ...]] = {  # and whatever these may
    "model": BOTTOM,
    "quant": ("model",),
    "checkpoint": ("quant",),
    "info": ("checkpoint",),
    "data": BOTTOM,
    "atlas": ("checkpoint", "data"),
    "convert": ("atlas",),
    "deepopt": ("atlas",),
    "tune": ("deepopt", "convert"),
    "upcycling": ("tune", "info"),
    "engine": ("convert",),
    "route": ("engine",),
    "evaluate": ("engine",),
    "watch": ("atlas",),
    "serve": ("route", "watch"),
    "cli": (*BOTTOM, "info", "upcycling", "evaluate", "serve"),
    "__main__": ("cli",),
}
NEVER: dict[str, set[str]] = {"engine": {"data", "deepopt", "tune"}}
ROOMS = {*BOTTOM, *ABOVE}


@cache
def allowed(room: str) -> frozenset[str]:
    """The rooms that `room` may import, itself included."""
    if room in BOTTOM:
        return frozenset(BOTTOM[: BOTTOM.index(room) + 1])
    below = frozenset().union(*(allowed(r) for r in ABOVE[room])) | {room}
    return below - NEVER.get(room, set())


def imports(tree: ast.AST, package: list[str]) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of everything imported; relative names resolved from `package`, the file's own package.

    `from X import a` gives X.a, because `a` may be a module.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = [*base, *(node.module.split(".") if node.module else [])]
            yield from ((node.lineno, ".".join([*stem, alias.name])) for alias in node.names)


def for_types_only(node: ast.stmt) -> bool:
    """Whether this is an `if TYPE_CHECKING:` block."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def violations(path: Path, source: str) -> list[str]:
    """What the file `path` (relative to the package's folder) must not import, one line each."""
    tree = ast.parse(source)
    if path.name == "__init__.py" and path.parent == Path():
        tree.body = [node for node in tree.body if not for_types_only(node)]
        return [f"{path}:{line}: the package loads {name} when it is imported"
                for line, name in imports(tree, ["deepseek"]) if name.split(".")[0] == "deepseek"]
    room = path.parts[0].removesuffix(".py")
    if room not in ROOMS:
        return [f"{path}: {room} is not a room of the table"]
    found = []
    for line, name in imports(tree, ["deepseek", *path.parts[:-1]]):
        top, *rest = name.split(".")
        if top == "argparse" and room != "cli":
            found.append(f"{path}:{line}: only cli imports argparse")
        if top != "deepseek" or rest[:1] == ["__version__"]:
            continue
        if not rest or rest[0] not in ROOMS:
            found.append(f"{path}:{line}: imports {name}: import from the room itself")
        elif rest[0] not in allowed(room):
            found.append(f"{path}:{line}: {room} must not import {rest[0]}")
    return found


SOURCES = sorted(p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.py"))


def test_every_file_keeps_to_its_walls() -> None:
    assert Path("config.py") in SOURCES and Path("model/mla.py") in SOURCES
    broken = [v for path in SOURCES for v in violations(path, (PACKAGE / path).read_text(encoding="utf-8"))]
    assert not broken, "\n".join(broken)


def test_the_table_has_no_circle_and_knows_its_rooms() -> None:
    for room in ROOMS:  # `allowed` would not end on a circle
        assert room in allowed(room) <= ROOMS
        assert not any(room in allowed(other) and other in allowed(room) for other in ROOMS - {room})
    assert {"data", "deepopt", "tune"}.isdisjoint(allowed("engine") | allowed("route"))
    assert "data" in allowed("watch") and allowed("__main__") == ROOMS


@pytest.mark.parametrize(("path", "source", "guilty"), [
    ("model/mla.py", "from ..quant import fp8", "model must not import quant"),
    ("model/mla.py", "from .. import checkpoint", "model must not import checkpoint"),
    ("model/mla.py", "def f():\n    from ..engine import LLM", "model/mla.py:2: model must not import engine"),
    ("model/mla.py", "if TYPE_CHECKING:\n    from ..engine import LLM", "model must not import engine"),
    ("model/mla.py", "import deepseek.engine.sampler as s", "model must not import engine"),
    ("model/mla.py", "from deepseek import load_model", "import from the room itself"),
    ("model/mla.py", "import deepseek", "import from the room itself"),
    ("model/deep/er.py", "from ...quant.fp8 import BLOCK", "model must not import quant"),
    ("errors.py", "from .config import ModelConfig", "errors must not import config"),
    ("config.py", "from . import ops", "config must not import ops"),
    ("ids.py", "from .tokenizer import Tokenizer", "ids must not import tokenizer"),
    ("engine/engine.py", "from ..data import records", "engine must not import data"),
    ("engine/engine.py", "from ..tune import lora", "engine must not import tune"),
    ("engine/engine.py", "def f():\n    from .. import route", "engine.py:2: engine must not import route"),
    ("route/pool.py", "from ..serve import app", "route must not import serve"),
    ("route/pool.py", "from ..data import records", "route must not import data"),
    ("watch/alerts.py", "from ..route import pool", "watch must not import route"),
    ("ops/native.py", "from .. import _native", "import from the room itself"),
    ("watch/alerts.py", "from ..engine import LLM", "watch must not import engine"),
    ("watch/terminal.py", "def f():\n    from argparse import Namespace", "terminal.py:2: only cli imports argparse"),
    ("utils/x.py", "", "utils is not a room"),
    ("helpers.py", "", "helpers is not a room"),
    ("__init__.py", "from .config import ModelConfig", "the package loads deepseek.config.ModelConfig"),
])
def test_the_checker_can_fail(path: str, source: str, guilty: str) -> None:
    [found] = violations(Path(path), source)
    assert guilty in found


@pytest.mark.parametrize(("path", "source"), [
    ("model/mla.py", "from ..config import X\nfrom ..ops.linear import mm\nfrom . import layers\nimport torch"),
    ("cli/x.py", "import argparse\nfrom .. import __version__\n"
                 "def f():\n    from ..serve import app\n    from ..info import fit"),
    ("quant/fp8.py", "from ..errors import CheckpointError"),
    ("route/pool.py", "from ..engine import LLM\nfrom ..atlas import Atlas\nfrom ..config import ModelConfig"),
    ("serve/app.py", "from ..route import pool"),
    ("serve/app.py", "from ..watch import metrics\nfrom ..engine import LLM\nfrom ..checkpoint import resolve"),
    ("__init__.py", "from importlib import import_module\nif TYPE_CHECKING:\n    from .engine import LLM as LLM"),
])
def test_and_can_pass(path: str, source: str) -> None:
    assert violations(Path(path), source) == []


# ---- circles --------------------------------------------------------------------------------------------------------


def circle(sources: Mapping[Path, str]) -> list[str]:
    """Modules of which each imports the next and the last is the first again, if there are such; [] without."""
    def name_of(path: Path) -> str:
        return ".".join(["deepseek", *path.with_suffix("").parts]).removesuffix(".__init__")

    graph: dict[str, set[str]] = {name_of(path): set() for path in sources}
    for path, source in sources.items():
        for _, name in imports(ast.parse(source), ["deepseek", *path.parts[:-1]]):
            imported = name if name in graph else name.rpartition(".")[0]  # a name in a module is no module
            if imported in graph:
                graph[name_of(path)].add(imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert circle({path: (PACKAGE / path).read_text(encoding="utf-8") for path in SOURCES}) == []


@pytest.mark.parametrize(("one", "other"), [
    ("from .b import x", "from .a import y"),
    ("from . import b", "from . import a"),
    ("from . import b", "def f():\n    from .a import y"),
    ("import deepseek.room.b", "if TYPE_CHECKING:\n    from deepseek.room import a"),
    ("from .. import __version__", ""),
])
def test_and_a_circle_is_found(one: str, other: str) -> None:
    room = {Path("room/a.py"): one, Path("room/b.py"): other, Path("room/c.py"): "from . import a, b"}
    found = circle(room | {Path("__init__.py"): "def f():\n    from .room import c"})
    assert found and found[0] == found[-1] and "deepseek.room.a" in found
    assert circle(room | {Path("room/a.py"): "import os\nfrom .. import errors"}) == []


# ---- what the command line loads ------------------------------------------------------------------------------------

HEAVY = {"torch", "numpy", "transformers", "matplotlib", "huggingface_hub", "safetensors", "tokenizers"}


def loaded_at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The import statements that run when a module is imported: not those in functions or under TYPE_CHECKING."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif for_types_only(node):
            yield from loaded_at_import(getattr(node, "orelse", []))
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for inner in ("body", "orelse", "finalbody"):
                yield from loaded_at_import(getattr(node, inner, []))


def heavy_chains(start: str) -> list[str]:
    """Every way from `deepseek.<start>` at import time to a heavy library, as `a -> b -> library`."""
    found, seen, queue = [], {start}, [[start]]
    while queue:
        chain = queue.pop()
        file = PACKAGE.joinpath(*chain[-1].split(".")).with_suffix(".py")
        package = chain[-1].split(".")[:-1]
        if not file.is_file():
            file, package = file.with_suffix("") / "__init__.py", chain[-1].split(".")
        statements = ast.Module(list(loaded_at_import(ast.parse(file.read_text(encoding="utf-8")).body)), [])
        for _, name in imports(statements, ["deepseek", *package]):
            top, *rest = name.split(".")
            if top in HEAVY:
                found.append(" -> ".join([*chain, top]))
            for depth in range(1, len(rest) + 1) if top == "deepseek" else ():
                module = ".".join(rest[:depth])
                path = PACKAGE.joinpath(*rest[:depth])
                if module not in seen and (path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()):
                    seen.add(module)
                    queue.append([*chain, module])
    return found


def test_the_command_line_loads_nothing_heavy_at_import() -> None:
    modules = [path.stem for path in SOURCES if path.parts[0] == "cli"]
    assert {"main", "train"} <= {*modules}
    assert [chain for name in modules for chain in heavy_chains(f"cli.{name}")] == []


def test_and_the_chain_to_a_heavy_library_is_named() -> None:
    chains = heavy_chains("checkpoint")
    assert any(c.startswith("checkpoint -> checkpoint.models -> ") and c.endswith(" -> torch") for c in chains)
    assert any(" -> model" in c for c in chains)
    assert heavy_chains("config") == []
