"""`make test-isa`: what it says of entries that this machine cannot run, and of those that fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

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
    assert "---- bf16_torch\n1 failed\n" in said and "4 entries passed, 1 failed, 4 were not run" in said
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


@pytest.mark.parametrize(("asked", "own", "torchs", "rates", "chosen"), [
    ("", True, True, {"fp32": 1, "units": 8, "torch": 9}, "units"), ("", True, False, {"fp32": 2, "units": 1}, "fp32"),
    ("", True, True, {"fp32": 1, "units": 4, "torch": 9}, "torch"), ("", False, True, {"fp32": 1, "torch": 3}, "torch"),
    ("", False, True, {"fp32": 2, "torch": 3}, "fp32"), ("", False, False, {}, "fp32"),
    ("fp32", True, True, {}, "fp32"), ("torch", False, False, {}, "torch"), ("units", True, True, {}, "units")])
def test_how_bf16_is_computed(
    asked: str, own: bool, torchs: bool, rates: dict[str, float], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSEEK_BF16", asked)
    monkeypatch.setattr(native, "torch_has_bf16_units", lambda: torchs)
    monkeypatch.setattr(native, "native", SimpleNamespace(bf16_units=lambda: "amx_bf16" if own else ""))
    monkeypatch.setattr(native, "CHOSEN", True)

    def measured() -> dict[str, float]:
        assert rates, "nothing is measured where there is no choice"
        return rates

    assert native.choose_bf16(measured) == chosen


@pytest.mark.parametrize(("units", "chosen"), [(True, "torch"), (False, "fp32")])
def test_without_vector_instructions_torchs_units_are_used(
    units: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DEEPSEEK_BF16", raising=False)
    monkeypatch.setattr(native, "torch_has_bf16_units", lambda: units)
    monkeypatch.setattr(native, "CHOSEN", False)
    assert native.choose_bf16(dict) == chosen


@pytest.mark.parametrize(("limit", "units"), [("", True), ("avx2", False), ("AVX512_CORE_VNNI", False),
                                              ("AVX512_CORE_AMX", True)])
def test_onednns_limit_counts(limit: str, units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert native.torch_has_bf16_units() == units


def test_what_is_unknown_or_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_BF16", "fast")
    with pytest.raises(ConfigError, match="DEEPSEEK_BF16 = 'fast': must be units"):
        native.asked_bf16()
    monkeypatch.setenv("DEEPSEEK_BF16", "units")
    monkeypatch.setattr(native, "native", SimpleNamespace(bf16_units=lambda: ""))
    with pytest.raises(ConfigError, match="DEEPSEEK_BF16 = units: this machine"):
        native.asked_bf16()
