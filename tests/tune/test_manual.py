"""The examples of docs/tuning.md run as they stand there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepseek.checkpoint import load_model
from deepseek.cli import main
from tests.helpers import ROOT
from tests.helpers.jsonl import write_jsonl
from tests.helpers.records import records

MANUAL = ROOT / "docs" / "tuning.md"


def examples(heading: str) -> list[str]:
    """The code blocks under a heading."""
    text = MANUAL.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"(?ms)^```\w+\n(.*?)^```$", text)


def test_examples_of_adapters_and_merges_run(
    base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("deepseek.tune.tuner.GENERAL_FILES", 1)
    Path("runs/named").mkdir(parents=True)
    base().rename("runs/named/model")
    Path("records").mkdir()
    write_jsonl(Path("records/law.jsonl"), records(16))
    tuned, alone = examples("LoRA adapters")
    exec(tuned, {})
    assert load_model("runs/named/model", adapter="runs/law-lora/adapter")
    exec(alone, {})
    assert load_model("runs/mine/model", verify=True)
    assert main(["tune", "runs/named/model", "records/law.jsonl", "--expert_tune", "law_expert", "--out", "runs/law",
                 "--steps", "1"]) == 0
    (commands,) = examples("Merged, and in four bits")
    for line in commands.strip().splitlines():
        program, *words = shlex.split(line)
        assert program == "deepseek" and main(words) == 0
    four, too = ((Path("runs") / name / "model.safetensors").read_bytes() for name in ("law-nf4", "law-nf4-too"))
    assert four == too
