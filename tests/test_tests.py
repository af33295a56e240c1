"""The tests themselves: each can fail, and modules are found without tricks."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator

from tests.helpers import ROOT

ASSERTING = {"raises", "warns", "fail", "assert_close", "assert_allclose", "assert_array_equal"}
TREES = {path.relative_to(ROOT): ast.parse(path.read_text(encoding="utf-8"))
         for path in sorted((ROOT / "tests").rglob("*.py"))}


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def called(node: ast.AST) -> set[str]:
    """Names of what is called in a function, "assert" for an assertion."""
    return {"assert" if isinstance(one, ast.Assert) else ast.unparse(one.func).rpartition(".")[2]
            for one in ast.walk(node) if isinstance(one, ast.Assert | ast.Call)}


def test_every_test_asserts() -> None:
    """By itself or in a function of the tests that it calls."""
    calls: defaultdict[str, set[str]] = defaultdict(set)
    for tree in TREES.values():
        for function in functions(tree):
            calls[function.name] |= called(function)
    asserting = {"assert", *ASSERTING}
    while more := {name for name, own in calls.items() if own & asserting} - asserting:
        asserting |= more
    idle = [f"{path}: {function.name}" for path, tree in TREES.items() for function in functions(tree)
            if function.name.startswith("test_") and not called(function) & asserting]
    assert len(calls) > 1000 and idle == []


def test_no_test_changes_where_python_looks_for_modules() -> None:
    """tests.helpers is imported by name (pyproject.toml)."""
    tricks = [str(path) for path, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, ast.Call)
              and ast.unparse(node.func) in ("sys.path.insert", "sys.path.append", "monkeypatch.syspath_prepend")]
    assert tricks == []
