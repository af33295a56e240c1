"""`make test-isa`: what it says of entries that this machine cannot run, and of those that fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import deepseek
from deepseek.errors import ConfigError
from deepseek.ops import native
from tests.helpers import isa


def test_entries_that_cannot_run_are_not_counted_as_passed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(isa, "here", lambda: ["avx2", "scalar"])
    monkeypatch.setattr(isa, "run", lambda *_, **env: (env != {"DEEPSEEK_BF16": "torch"}, "1 failed"))
    assert isa.main(short=True) == 1
    said = capsys.readouterr().out
    assert "amx           cannot run here: needs AMX-INT8\n" in said and "bf16_torch    FAILED\n" in said
    assert "amx_emulated  cannot run here: needs AVX512-VNNI\n" in said
    assert "---- bf16_torch\n1 failed\n" in said and "4 entries passed, 1 failed, 3 were not run" in said
    monkeypatch.setattr(isa, "run", lambda *_, **env: (True, "2 passed"))
    assert isa.main(short=True) == 0 and "5 entries passed, 0 failed" in (said := capsys.readouterr().out)
    assert "scalar        passed: 2 passed\n" in said


def test_the_build_with_emulated_tiles_is_an_entry_of_the_full_form(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(isa, "here", lambda: ["avx512_vnni", "avx2", "scalar"])
    monkeypatch.setattr(isa, "run", lambda *_, **env: (True, "2 passed"))
    monkeypatch.setattr(isa, "build_emulated", lambda: (False, "no compiler"))
    assert isa.main(short=True) == 0 and "amx_emulated  left out" in capsys.readouterr().out
    assert isa.main(short=False) == 1 and "---- amx_emulated\nno compiler\n" in capsys.readouterr().out
    monkeypatch.setattr(isa, "build_emulated", lambda: (True, ""))
    assert isa.main(short=False) == 0 and "amx_emulated  passed: 2 passed\n" in capsys.readouterr().out
    found = subprocess.run([sys.executable, "-c", "from importlib.util import find_spec as find\n"
                            "print(find('deepseek._native').origin, find('deepseek.errors').origin)"],
                           env=os.environ | isa.SETTINGS["amx_emulated"], capture_output=True, text=True, check=True)
    library, module = found.stdout.split()
    assert Path(library).parent == isa.ROOT / "build/emulated"
    assert Path(module) == Path(deepseek.__file__).with_name("errors.py")


@pytest.mark.parametrize(("asked", "limit", "units", "chosen"), [
    ("", "", True, "torch"), ("", "", False, "native"), ("native", "", True, "native"), ("torch", "", False, "torch"),
    ("", "avx2", True, "native"), ("", "AVX512_CORE_VNNI", True, "native"), ("", "AVX512_CORE_AMX", True, "torch"),
    ("torch", "AVX2", True, "torch")])
def test_how_bf16_is_computed(
    asked: str, limit: str, units: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSEEK_BF16", asked)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    monkeypatch.setattr(native, "has_bf16_units", lambda: units)
    assert native.choose_bf16() == chosen


def test_an_unknown_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_BF16", "fast")
    with pytest.raises(ConfigError, match="DEEPSEEK_BF16 = 'fast': must be native"):
        native.choose_bf16()
