"""Checkpoints that are written while training continues: what they hold, and what happens where writing fails."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek.data import Document, TokenShards, pack
from deepseek.deepopt import saving
from deepseek.deepopt.loop import TrainingLoop
from deepseek.deepopt.run_folder import checkpoints
from deepseek.deepopt.settings import TrainConfig
from deepseek.files import sha256
from deepseek.model import CausalLM
from deepseek.tokenizer import Tokenizer
from tests.helpers.killed_runs import TINY

CONFIG = TrainConfig(steps=6, batch_size=2, seq_len=32, warmup_steps=2, eval_every=100, save_every=2, keep=9)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    documents = [Document(" ".join(f"the fox {i} sees the moon {j} ." for j in range(9)), f"story {i}")
                 for i in range(40)]
    tokenizer = Tokenizer.train((d.text for d in documents), TINY.vocab_size)
    return pack(documents, tokenizer, tmp_path_factory.mktemp("data") / "tokens", valid_fraction=0.1)


def new_model() -> CausalLM:
    return CausalLM(TINY).init_weights(torch.Generator().manual_seed(0))


def files(out: Path, step: int) -> dict[str, str]:
    folder = out / f"checkpoint-{step:06d}"
    return {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))}


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory is free."""
    monkeypatch.setattr(saving, "ram", lambda: (0, 0))


class Late(TrainingLoop):
    """Begins to write checkpoint 2 when step 4 is taken."""

    def __init__(self, *args: Any, **more: Any) -> None:
        self.may_write = threading.Event()
        super().__init__(*args, **more)

    def _write(self, path: Path, *args: Any) -> Path:
        assert self.may_write.wait(60)
        return super()._write(path, *args)

    def train_step(self) -> dict[str, Any]:
        if self.step == 3:  # after the checkpoint of step 2, and before that of 4 waits for it
            assert not checkpoints(self.out)
            self.may_write.set()
        return super().train_step()


@pytest.mark.parametrize("more", [{}, {"optimizer": "muon", "moments": "8bit", "weights": "bf16"}])
def test_holds_the_state_of_its_step(
    data: TokenShards, tmp_path: Path, request: pytest.FixtureRequest, more: dict[str, Any]
) -> None:
    config = replace(CONFIG, **more)
    torch.manual_seed(0)  # a checkpoint has the random state
    Late(new_model(), data, config, tmp_path / "late").run()
    request.getfixturevalue("full")
    torch.manual_seed(0)
    TrainingLoop(new_model(), data, config, tmp_path / "at-once").run()
    for step in (2, 4, 6):
        assert files(tmp_path / "late", step) == files(tmp_path / "at-once", step) != {}


def test_waits_where_memory_has_no_room_for_copies(data: TokenShards, tmp_path: Path, full: None) -> None:
    class Watched(TrainingLoop):
        def _write(self, path: Path, *args: Any) -> Path:
            assert threading.current_thread() is threading.main_thread()
            return super()._write(path, *args)

    Watched(new_model(), data, CONFIG, tmp_path / "run").run()
    assert len(checkpoints(tmp_path / "run")) == 3


def test_a_failed_write_ends_the_run_at_the_next_step(data: TokenShards, tmp_path: Path) -> None:
    class Failing(TrainingLoop):
        def _write(self, path: Path, *args: Any) -> Path:
            raise OSError(28, "No space left on device", str(path))

        def train_step(self) -> dict[str, Any]:
            if self.saving._begun:  # else this step may be taken before the thread has tried
                self.saving._begun[0].exception(60)
            return super().train_step()

    steps: list[int] = []
    with pytest.raises(OSError, match="No space left on device"):
        Failing(new_model(), data, CONFIG, tmp_path / "run").run(lambda record: steps.append(record["step"]))
    assert steps == [1, 2]


def test_the_last_error_is_raised_when_the_run_ends(data: TokenShards, tmp_path: Path) -> None:
    class Failing(TrainingLoop):
        def _write(self, path: Path, *args: Any) -> Path:
            if path.name == "checkpoint-000006":
                raise OSError(28, "No space left on device", str(path))
            return super()._write(path, *args)

    with pytest.raises(OSError, match="checkpoint-000006"):
        Failing(new_model(), data, CONFIG, tmp_path / "run").run()
