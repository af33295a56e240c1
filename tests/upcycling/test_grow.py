"""Growing named experts: nothing of the base moves, the experts learn, a stopped run resumes bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek.atlas import Atlas
from deepseek.checkpoint import load_model, read_package
from deepseek.cli import main
from deepseek.convert import install, installed, remove
from deepseek.errors import ConfigError, DataError, NotFoundError
from deepseek.model import CausalLM
from deepseek.model.gate import Route, score_guidance_loss
from deepseek.upcycling.gates import fit_rows
from deepseek.upcycling.grow import base_of, grow
from deepseek.upcycling.settings import GrowConfig
from tests.helpers.expert_packages import hashes, make_base
from tests.helpers.jsonl import write_jsonl

pytestmark = pytest.mark.filterwarnings("ignore:.*unsigned:UserWarning")
SMALL = GrowConfig(first_layer=1, group_experts=2, group_width=16, steps=24, rows=4, seq_len=24, lr=2e-2, gate_lr=0.3,
                   gate_tokens=300, eval_every=12, save_every=6, precision="fp32", license="MIT")


def texts(word: str, count: int = 60) -> list[dict[str, str]]:
    return [{"text": f"the {word} {n} {word} brown fox {word} {n * 7 % 13} {word}"} for n in range(count)]


NAMES = {"fox_expert": texts("quick"), "digit_expert": texts("12345")}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("grow") / "base")


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("grow") / "run"
    return out, grow(base, NAMES, out, SMALL)


def test_named_text_gets_easier_and_goes_to_its_group(run: tuple[Path, Any]) -> None:
    out, report = run
    for name in NAMES:
        assert report.after[name] < report.before[name] - 0.1
        package = read_package(out / "packages" / f"{name}.safetensors")
        assert package.info.license == "MIT" and package.info.layers == (1, 2)
        assert package.info.evidence["perplexity_after"] < package.info.evidence["perplexity_before"]
    assert report.tokens == dict.fromkeys(NAMES, 24 * 2 * 24)
    assert Atlas.load(out / "model").names == tuple(NAMES)
    assert json.loads((out / "report.json").read_text())["after"] == report.after
    for picture in ("loss.png", "names.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


def test_without_its_packages_the_model_is_the_base_again(run: tuple[Path, Any], base: Path, tmp_path: Path) -> None:
    model = shutil.copytree(run[0] / "model", tmp_path / "model")
    for name in reversed(NAMES):
        remove(model, name)
    assert hashes(model) == hashes(base)


def test_packages_are_what_was_trained(run: tuple[Path, Any], base: Path, tmp_path: Path) -> None:
    """Installed again, with the bias that they came with, they make the model that is under OUT."""
    model = shutil.copytree(base, tmp_path / "model")
    for name in NAMES:
        install(run[0] / "packages" / f"{name}.safetensors", model)
    assert hashes(model) == hashes(run[0] / "model")
    grown = installed(model)
    assert grown is not None and grown.names == list(NAMES)


def test_a_stopped_run_goes_on_with_equal_numbers(base: Path, tmp_path: Path, run: tuple[Path, Any]) -> None:
    from deepseek.upcycling.loop import GrowTrainer

    class StoppedError(Exception):
        pass

    def step(self: GrowTrainer, original: Any = GrowTrainer.train_step) -> dict[str, Any]:
        if self.step == 9:
            raise StoppedError
        return dict(original(self))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GrowTrainer, "train_step", step)
        with pytest.raises(StoppedError):
            grow(base, NAMES, tmp_path / "run", SMALL)
    assert grow(base, NAMES, tmp_path / "run", SMALL).after == run[1].after
    for name in NAMES:
        again = read_package(tmp_path / "run" / "packages" / f"{name}.safetensors").info
        assert again.tensors == read_package(run[0] / "packages" / f"{name}.safetensors").info.tensors


def test_gates_are_fitted_anew_to_other_text_and_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    one = GrowConfig(**{**vars(SMALL), "others": [], "steps": 1})
    grow(base, NAMES, tmp_path / "run", one)
    rows = (tmp_path / "run" / "gates.safetensors").read_bytes()
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / "gates.safetensors").write_bytes(rows)  # what a run leaves that was stopped before its first step
    grow(base, dict(reversed(NAMES.items())), fresh, one)
    assert (fresh / "gates.safetensors").read_bytes() != rows
    with pytest.raises(ConfigError, match="holds a run with fingerprint"):
        grow(make_base(tmp_path / "other", seed=1), NAMES, tmp_path / "run", one)


def test_a_base_is_made_once_and_of_one_source(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert base_of(base, tmp_path / "run" / "base") == base and not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="is in DeepSeek-V3's form already"):
        base_of(base, tmp_path / "run" / "base", "bfloat16")
    monkeypatch.setattr("deepseek.upcycling.grow.upcycle", lambda source, out, *_, **own: shutil.copytree(base, out))
    folder, source, other = (tmp_path / name for name in ("run/base", "dense.gguf", "other.gguf"))
    with pytest.raises(NotFoundError, match=r"dense\.gguf: no such file"):
        base_of(source, folder)
    for file in (source, other):
        file.write_bytes(b"GGUF")
    for _ in range(2):
        assert base_of(source, folder) == folder
    with pytest.raises(ConfigError, match=r"was made of .*dense\.gguf.*, not of .*other\.gguf"):
        base_of(other, folder)
    source.write_bytes(b"GGUF of another model")
    with pytest.raises(ConfigError, match=r"was made of .* remove the run"):
        base_of(source, folder)


def test_the_records_are_looked_for_before_the_base_is_made(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dense.gguf").write_bytes(b"GGUF")
    for words in (["fox=nowhere.txt"], [f"fox={base / 'config.json'}", "--others", "nowhere.txt"]):
        assert main(["upcycle", str(tmp_path / "dense.gguf"), str(tmp_path / "run"), "--grow", *words])
        assert "nowhere.txt" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_losses_before_and_after_are_of_the_same_records(run: tuple[Path, Any], base: Path, tmp_path: Path) -> None:
    shutil.copytree(run[0], tmp_path / "run")
    with pytest.raises(ConfigError, match=f"eval_rows = 5: .*is of {SMALL.eval_rows}"):
        grow(base, NAMES, tmp_path / "run", GrowConfig(**{**vars(SMALL), "eval_rows": 5}))


def test_nothing_changes_before_the_first_step(base: Path, tmp_path: Path) -> None:
    """The new experts put out nothing, so the losses before are the base's."""
    report = grow(base, {"fox_expert": NAMES["fox_expert"]}, tmp_path / "run",
                  GrowConfig(**{**vars(SMALL), "steps": 1, "others": [], "lr": 1e-9, "warmup": 0.0}))
    model, ids = load_model(base), torch.tensor([[5, 17, 3, 99, 250, 7, 7, 12]])
    with torch.no_grad():
        assert torch.allclose(load_model(tmp_path / "run" / "model")(ids), model(ids), atol=1e-4)
    assert report.after["fox_expert"] == pytest.approx(report.before["fox_expert"], abs=1e-4)


def test_others_are_negatives_and_nothing_of_them_is_learnt(base: Path, tmp_path: Path) -> None:
    others = write_jsonl(tmp_path / "others.jsonl", texts("12345"))
    config = GrowConfig(**{**vars(SMALL), "others": [others], "steps": 12})
    report = grow(base, {"fox_expert": NAMES["fox_expert"]}, tmp_path / "run", config)
    assert report.tokens == {"fox_expert": 32 * 24, "": 16 * 24}
    model = load_model(tmp_path / "run" / "model")
    opened = {}
    for name, records in NAMES.items():
        opened[name] = gate_scores(model, records, base)
    assert opened["fox_expert"] > opened["digit_expert"] + 0.2


def gate_scores(model: CausalLM, records: list[dict[str, str]], base: Path) -> float:
    """Mean affinity of all experts for a text."""
    from deepseek.model import RoutingRecord
    from deepseek.tokenizer import Tokenizer

    routing = RoutingRecord()
    ids = torch.tensor([Tokenizer.load(base).encode(records[0]["text"])])
    with torch.no_grad():
        model.hidden(ids, routing=routing)
    return float(torch.stack([route.scores_TE.mean() for route in routing.routes.values()]).mean())


def test_score_guidance_counts_each_group_alone() -> None:
    """By hand: two groups of two experts, three tokens of group 0, of group 1 and of none; one without a label."""
    scores_TE = torch.tensor([[0.9, 0.8, 0.1, 0.2], [0.3, 0.4, 0.7, 0.6], [0.5, 0.1, 0.2, 0.3], [0.9, 0.9, 0.9, 0.9]])
    route = Route(torch.zeros(4, 2, dtype=torch.long), torch.zeros(4, 2), scores_TE)
    got = score_guidance_loss(route, torch.tensor([0, 1, 2, -1]), 2)
    log = torch.log
    inside = (-log(scores_TE[0, :2]).mean(), -log(scores_TE[1, 2:]).mean())
    outside = (-(log(1 - scores_TE[1, :2]).mean() + log(1 - scores_TE[2, :2]).mean()) / 2,
               -(log(1 - scores_TE[0, 2:]).mean() + log(1 - scores_TE[2, 2:]).mean()) / 2)
    assert float(got) == pytest.approx(float(sum(inside) + sum(outside)) / 4, rel=1e-5)


def test_fitted_rows_tell_planted_directions_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    label_T = torch.arange(600) % 3
    x_TH = torch.randn(600, 16, generator=generator) + 2.0  # with a mean, which serves as intercept
    x_TH[torch.arange(600), label_T] += 4.0
    score_TG = (x_TH @ fit_rows(x_TH, label_T, 2).t()).sigmoid()
    assert (score_TG[label_T == 0, 0] > 0.5).float().mean() > 0.95
    assert (score_TG[label_T != 1, 1] < 0.5).float().mean() > 0.95


@pytest.mark.parametrize(("changes", "error", "names", "message"), [
    ({"first_layer": 3}, ConfigError, NAMES, "first_layer = 3: must be below the model's 3 layers"),
    ({"group_width": 24}, ConfigError, NAMES, "group_width = 24: must divide the FFN's 64"),
    ({"group_experts": 8}, ConfigError, NAMES, "group_experts = 8: experts of width 16 are together wider"),
    ({}, ConfigError, {}, "names: at least one NAME=DATA"),
    ({}, ConfigError, {"a/b": NAMES["fox_expert"]}, "names: name = 'a/b': must be 1 to 64 letters"),
    ({"seq_len": 2000}, DataError, {"fox_expert": texts("quick", 4)}, "fewer than one row of 2000"),
])
def test_what_does_not_fit_is_refused_before_any_work(base: Path, tmp_path: Path, changes: dict[str, Any],
                                                      error: type[Exception], names: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        grow(base, names, tmp_path / "run", GrowConfig(**{**vars(SMALL), "others": [], **changes}))
    assert not (tmp_path / "run" / "settings.json").exists()


def test_the_command_grows_from_a_base(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {name: write_jsonl(tmp_path / f"{name}.jsonl", records) for name, records in NAMES.items()}
    grown = [f"{name}={path}" for name, path in data.items()]
    shape = "--steps 2 --first_layer 1 --group_experts 2 --group_width 16 --rows 2 --seq_len 24 --gate_tokens 100"
    command = ["upcycle", str(base), str(tmp_path / "run"), "--grow", *grown, *shape.split()]
    assert main(command) == 0
    assert "fox_expert" in capsys.readouterr().out and (tmp_path / "run" / "model" / "config.json").is_file()
    assert main([*command, "--overwrite"]) == 2
    assert main(["upcycle", str(base), str(tmp_path / "other"), "--steps", "3"]) == 2
    assert "steps = 3: has a meaning only with grow" in capsys.readouterr().err
    assert main(["upcycle", str(tmp_path / "run" / "model"), str(tmp_path / "again"), "--grow", grown[0]]) == 2
    assert "give the base without them" in capsys.readouterr().err
