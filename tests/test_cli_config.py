"""--config FILE.yaml of train, serve and tune: flags win over the file, and what is wrong in it is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepseek.cli.common import MachineOptions, ModelOptions
from deepseek.cli.main import main
from deepseek.cli.parser import given_settings, make
from deepseek.engine.options import EngineOptions
from deepseek.errors import RequestError
from deepseek.serve.options import ServeOptions
from deepseek.watch.options import WatchOptions

Run = Callable[..., list[Any]]


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs `deepseek train` with a file up to the training: what Trainer and fit are given."""
    from deepseek.deepopt import trainer

    given: list[Any] = []

    class Nothing:
        sites = None

        def __init__(self, config: Any = None, **settings: Any) -> None:
            given.extend([config, settings])

        def fit(self, data: Any) -> Path:
            given.append(data)
            return Path("model")

    def run(yaml: str, *flags: str) -> list[Any]:
        given.clear()
        (tmp_path / "c.yaml").write_text(yaml)
        assert main(["train", *flags, "--config", str(tmp_path / "c.yaml")]) == 0
        return given

    monkeypatch.setattr(trainer, "Trainer", Nothing)
    return run


def test_train_takes_all_from_a_file_and_flags_win(train: Run) -> None:
    yaml = "config: nano\ndata: notes\nout: runs/a\nsteps: 30\nlr: 1e-3\ntensorboard: true\nseed: null\n"
    assert train(yaml) == ["nano", {"out": "runs/a", "map": None, "steps": 30, "lr": 1e-3, "tensorboard": True},
                           ["notes"]]
    config, settings, data = train(yaml, "small", "a", "b", "--steps=40", "--no-tensorboard", "--out", "runs/b")
    assert (config, data) == ("small", ["a", "b"])
    assert settings == {"out": "runs/b", "map": None, "steps": 40, "lr": 1e-3, "tensorboard": False}
    named = "from: base\nexperts: {law_expert: [a, b], code_expert: c}\nout: o\nmap: {text: body}\ndevice: cpu\n"
    assert train(named) == [None, {"out": "o", "map": {"text": "body"}, "from_model": "base", "device": "cpu"}, {
        "law_expert": ["a", "b"], "code_expert": ["c"]}]
    assert train(named, "--experts", "x=y")[2] == {"x": ["y"]}
    assert train("from_model: base\nout: o\n", "d") == [None, {"out": "o", "map": None, "from_model": "base"}, ["d"]]


@pytest.mark.parametrize(("command", "yaml", "message"), [
    ("train", "step: 3\n", "c.yaml: unknown setting step; there are config, data, "),
    ("train", "steps: many\n", "steps = 'many': must be an integer >= 1"),
    ("train", "steps: 0\n", "steps = 0: must be an integer >= 1"), ("train", "out: 3\n", "out = 3: must be a text"),
    ("train", "data: [3]\n", "data = [3]: must be texts"),
    ("train", "- steps\n", "c.yaml: must be a table of settings, got list"), ("train", "a: [\n", "c.yaml: not YAML"),
    ("train", "config_file: x\n", "unknown setting config_file"), ("train", "help: true\n", "unknown setting help"),
    ("serve", "prot: 80\n", "did you mean port?"),
    ("serve", "port: 99999\n", "port = 99999: must be an integer from 0"),
    ("serve", "history_days: 0\n", "history_days = 0: must be above 0"),
    ("serve", "api_key: 3\n", "api_key: must be texts"),
    ("serve", "api_key: ['', sk-secret]\n", "api_key: must be texts, none of them empty"),
    ("serve", "log: 1\n", "log = 1: must be true or false"), ("serve", "model: [a]\n", "model = ['a']: must be a text"),
    ("serve", "policy: lifo\n", "policy = 'lifo': must be fcfs or expert"),
    ("serve", "batch_size: 3\nmax_num_seqs: 3\n", "max_num_seqs and batch_size: are two names of one setting"),
    ("tune", "expert_tun: a\n", "did you mean expert_tune?"), ("tune", "rounds: 0\n", "rounds = 0: must be an integer"),
])
def test_what_is_wrong_in_a_file_is_one_line(
    command: str, yaml: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(yaml)
    words = {"train": ["nano"] if "data" in yaml else ["nano", "nowhere"], "tune": ["nowhere", "nowhere"],
             "serve": ["--port", "0"] if "port:" not in yaml else []}[command]
    words += ["nowhere"] if command == "serve" and "model:" not in yaml else []
    words += ["--out", "o"] if command == "train" and "out:" not in yaml else []
    assert main([command, *words, "--config", "c.yaml"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and message in said and "sk-secret" not in said


def test_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--config", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err == "deepseek: nowhere.yaml: no such file\n"


def test_what_neither_file_nor_flags_say_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("steps: 3\n")
    for command, missing in (("train", "--out"), ("serve", "MODEL")):
        (tmp_path / "c.yaml").write_text("seed: 3\n" if command == "train" else "port: 3\n")
        with pytest.raises(SystemExit):
            main([command, "--config", str(tmp_path / "c.yaml")])
        assert f"required: {missing}" in capsys.readouterr().err


def test_serve_takes_all_from_a_file_and_flags_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Any] = []

    def stop(args: Any) -> Any:
        made.extend([args.model, make(args, ServeOptions, watch=make(args, WatchOptions)), make(args, ModelOptions),
                     make(args, MachineOptions), EngineOptions.of(given_settings(args, EngineOptions))])
        raise RequestError("enough")

    monkeypatch.setattr("deepseek.cli.serve.make_llm", stop)
    (tmp_path / "c.yaml").write_text(
        "model: m\nport: 0\napi_key: [a, b]\ncors_origin: https://a.example\nhistory_days: 3\nlog: true\n"
        "adapter: {law: runs/law}\nchat_template_kwargs: {thinking: true}\nbatch_size: 8\nprefetch: false\n"
        "warmup_experts: [law_expert, code_expert]\ndevice: cpu\n")
    words = ["serve", "--config", str(tmp_path / "c.yaml")]
    assert main([*words, "--history_days", "4", "--api_key", "c", "--no-log"]) == 2
    assert capsys.readouterr().err == (
        "deepseek: warning: `batch_size` is called `max_num_seqs` now\ndeepseek: enough\n")
    assert made == ["m", ServeOptions(port=0, api_key=("c",), cors_origin=("https://a.example",),
                                      watch=WatchOptions(history_days=4)),
                    ModelOptions(adapter=("law=runs/law",), chat_template_kwargs={"thinking": True}), MachineOptions(),
                    EngineOptions(max_num_seqs=8, prefetch=False, warmup_experts=("law_expert", "code_expert"))]
    made.clear()
    assert main([*words, "other", "--batch-size", "4"]) == 2
    assert made[0] == "other" and made[-1].max_num_seqs == 4
