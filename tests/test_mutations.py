"""Checkpoints with something wrong in any of their files (mutations.py): a run, or one clear line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.mutations import Kind, attempt, fault_of, make_kinds, run, sweep, table

FAST = 60
pytestmark = pytest.mark.filterwarnings("default::UserWarning")  # a command says it and goes on


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Kind]]:
    root = tmp_path_factory.mktemp("mutations")
    return root, make_kinds(root)


@pytest.mark.parametrize("first", range(0, FAST, 10))
def test_some_changes(first: int, kinds: tuple[Path, list[Kind]], monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, so that a traceback is a failure here. Two commands a change: which ones, the seed says."""
    monkeypatch.delenv("DEEPSEEK_DEBUG", raising=False)
    root, every = kinds
    for seed in range(first, first + 10):
        kind = every[seed % len(every)]
        at = seed // len(every)
        some = kind._replace(commands=tuple({kind.commands[(at + i) % len(kind.commands)]: None for i in range(2)}))
        what, outcomes = attempt(some, seed, root, run)
        assert not [outcome for outcome in outcomes if outcome.fault], f"{kind.name}: {what}"


def test_whole_checkpoints_run(kinds: tuple[Path, list[Kind]]) -> None:
    """Else nothing above would mean anything."""
    root, every = kinds
    assert every
    for kind in {kind.name: kind for kind in every}.values():
        for number, command in enumerate(kind.commands):
            out = root / f"whole-{kind.name}-{number}".replace(" ", "-")
            status, errors = run(command, {"FOLDER": kind.folder, "MODEL": root / "whole", "BASE": root / "base",
                                            "OUT": out})
            assert status == 0, f"{kind.name}: {command}: {errors}"


@pytest.mark.parametrize(("status", "errors", "fault"), [
    (0, "", None), (1, "deepseek: no\n", None), (2, "deepseek: warning: a\ndeepseek: no\n", None),
    (-11, "", "signal 11"), (-9, "", "no answer in time"), (1, "Traceback\ndeepseek: x\n", "traceback"),
    (3, "deepseek: x\n", "status 3"), (2, "", "not one line"), (2, "deepseek: a\nmore\n", "not one line"),
    (1, "deepseek: KeyError: 'x' (DEEPSEEK_DEBUG=1 shows where)\n", "a mistake of ours"),
    (2, "deepseek: a\x1b[2J\n", "control characters"),
])
def test_what_counts_as_a_fault(status: int, errors: str, fault: str | None) -> None:
    assert fault_of(status, errors) == fault


@pytest.mark.slow
def test_a_thousand_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command in a process of its own, so that signals and endless runs are seen."""
    monkeypatch.delenv("DEEPSEEK_DEBUG", raising=False)
    cases = sweep(1000, 1000, tmp_path, tell=print)
    print(table(cases))
    assert not [f"{kind}: {what}: {outcome}" for kind, what, outcomes in cases for outcome in outcomes if outcome.fault]
