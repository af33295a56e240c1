"""`deepseek train --experts NAME=PATH …` from the command line."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from deepseek.atlas import Atlas
from deepseek.cli import main
from deepseek.config import ModelConfig

QUICK = ["--steps", "4", "--batch_size", "4", "--seq_len", "32", "--eval_every", "4", "--warmup_steps", "1",
         "--valid_fraction", "0.2"]


@pytest.fixture
def given(tmp_path: Path, tiny_config: Callable[..., ModelConfig]) -> tuple[str, list[str]]:
    draw = random.Random(0)
    words = [f"{a}{b}" for a in ("river", "house", "coin", "law", "act", "row", "pay") for b in ("", "s", "ing", "ed")]
    for name in ("law", "code"):
        (tmp_path / name).mkdir()
        for number in range(12):
            (tmp_path / name / f"{number}.txt").write_text(" ".join(draw.choices(words, k=50)))
    (tmp_path / "more.txt").write_text(" ".join(draw.choices(words, k=200)))
    config = tiny_config(vocab_size=300).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path / "config.json"), [f"law_expert={tmp_path / 'law'}", f"code_expert={tmp_path / 'code'}"]


def test_names_are_bound_to_groups_in_their_order(
    given: tuple[str, list[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, experts = given
    out = tmp_path / "run"
    command = ["train", config, "--experts", *experts, f"law_expert={tmp_path / 'more.txt'}", "--out", str(out), *QUICK]
    assert main(command) == 0
    assert "routing accuracy" in "".join(capfd.readouterr())
    assert Atlas.load(out / "model").names == ("law_expert", "code_expert")
    about = json.loads((out / "tokens" / "shards.json").read_text())
    assert about["experts"] == ["law_expert", "code_expert"] and about["documents"] == 25
    assert main(["atlas", "show", str(out / "model")]) == 0
    assert "code_expert" in capfd.readouterr().out
    unnamed = ["train", config, str(tmp_path / "more.txt"), "--experts", *experts, "--out", str(tmp_path / "b"), *QUICK]
    assert main(unnamed) == 0  # text without a name is learnt too
    assert json.loads((tmp_path / "b" / "tokens" / "shards.json").read_text())["experts"] == about["experts"]


@pytest.mark.parametrize(("words", "message"), [
    ([], "at least one DATA or --experts NAME=PATH must be given"),
    (["--experts", "law_expert"], "experts = 'law_expert': must read NAME=PATH"),
    (["--experts", "=x"], "must read NAME=PATH"),
    (["--experts", "law expert=x"], "the name made of letters, digits and _"),
    (["--experts", *(f"n{i}=x" for i in range(5))], "n_group = 4: must be at least 2, and one for each of the 5"),
    (["--experts", "law_expert=nowhere"], "nowhere: no such file or folder"),
])
def test_bad_names_are_refused(
    given: tuple[str, list[str]], tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", given[0], *words, "--out", str(tmp_path / "run"), *QUICK]) == 2
    assert message in capsys.readouterr().err


def test_all_groups_kept_would_choose_nothing(
    given: tuple[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Path(given[0])
    config.write_text(json.dumps(json.loads(config.read_text()) | {"topk_group": 4}))
    assert main(["train", given[0], "--experts", *given[1], "--out", str(tmp_path / "run"), *QUICK]) == 2
    assert "topk_group = 4: must be below n_group (4)" in capsys.readouterr().err
