"""The data of the benchmarks: what is fetched is what they read, and the generated sample takes its place."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from types import ModuleType

import pytest

from deepseek.data import ReadReport, read_documents
from tests.helpers import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def domains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    module = importlib.import_module("domains")
    monkeypatch.setattr(module, "DATA", tmp_path / "data")
    monkeypatch.setattr(module, "SAMPLE", tmp_path / "sample")
    return module


def read_files(domains: ModuleType) -> set[str]:
    return {file for table in (domains.TRAIN, domains.MORE) for files in table.values() for file in files} | {
        file for _, files in domains.UNSEEN.values() for file in files}


def test_every_file_that_is_read_is_fetched(domains: ModuleType) -> None:
    fetched = {f"{name}/{inner}" for name, one in importlib.import_module("fetch_data").SETS.items()
               for inner in one.files}
    assert [file for file in read_files(domains)
            if file not in fetched and not any(one.startswith(file + "/") for one in fetched)] == []


def test_sample_takes_the_place_of_data(domains: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    folder, kind = domains.data_folder(None)
    assert (folder, kind) == (domains.SAMPLE, "-sample")
    assert "fetch_data.py` fetches it" in (said := capsys.readouterr().out) and "figures mean nothing" in said
    for file in read_files(domains):
        report = ReadReport()
        documents = list(read_documents([folder / file], report))
        assert documents and not report.problems, file
    assert any(document.turns for document in read_documents([folder / domains.LAW_CASES], ReadReport()))


def test_incomplete_data_is_refused(domains: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for given in (None, tmp_path / "elsewhere"):
        with pytest.raises(SystemExit, match=r"no such file; `python benchmarks/fetch_data\.py` fetches it"):
            domains.data_folder(given)
    domains.write_sample(tmp_path / "elsewhere", records=2)
    assert domains.data_folder(tmp_path / "elsewhere") == (tmp_path / "elsewhere", "")


def test_no_benchmark_names_another_folder_of_data() -> None:
    scripts = sorted(BENCHMARKS.glob("*.py"))
    assert len(scripts) > 10
    for script in scripts:
        assert "shared/data" not in script.read_text(encoding="utf-8"), script.name
        assert ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))), script.name
