"""`deepseek tune` from the command line, from YAML and from a pipe; bad input is one line."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepseek import LoRAAdapter, MoEFineTuner
from deepseek.cli import main
from deepseek.errors import ConfigError
from deepseek.files import locked
from deepseek.tune.settings import TuneConfig
from tests.helpers.jsonl import write_jsonl
from tests.helpers.records import general, records


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    paths = tmp_path / "law.jsonl", tmp_path / "general.jsonl"
    for path, rows in zip(paths, (records(), general()), strict=True):
        write_jsonl(path, rows)
    return str(paths[0]), str(paths[1])


QUICK = ["--steps", "2", "--batch_size", "4", "--max_length", "64", "--lr", "3e-3", "--eval_records", "8"]


def test_flags_and_yaml_say_the_same(
    base: Callable[..., Path], files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, (law, rest) = str(base()), files
    assert main(["tune", model, law, "--retain_data", rest, "--out", str(tmp_path / "a"), "--expert_tune", "law_expert",
                 *QUICK]) == 0
    said = capsys.readouterr().out
    assert "all unchanged, by SHA-256" in said
    assert f"try:   deepseek infer --model {model} --adapter {tmp_path / 'a' / 'delta'} --prompt" in said
    (tmp_path / "tune.yaml").write_text(
        f"model: {model}\ndata: [{law}]\nretain_data: [{rest}]\nexpert_tune: [law_expert]\nsteps: 2\nbatch_size: 4\n"
        f"max_length: 64\nlr: 9e-0\neval_records: 8\nout: {tmp_path / 'b'}\n")
    assert main(["tune", "--config", str(tmp_path / "tune.yaml"), "--lr", "3e-3"]) == 0  # the flag wins
    one, two = ((tmp_path / out / "delta" / "delta.safetensors").read_bytes() for out in "ab")
    assert one == two
    assert main(["infer", "--model", model, "--adapter", str(tmp_path / "a" / "delta"), "--prompt", "pay",
                 "--max_tokens", "3"]) == 0


def test_former_names_of_data_still_work(
    base: Callable[..., Path], files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, (law, rest) = str(base()), files
    words = ["tune", model, law, "--out", str(tmp_path / "a"), "--expert_tune", "law_expert", "--replay", "0.2", *QUICK]
    assert main([*words, "--retain_data", rest, "--replay_data", rest]) == 0
    assert "now" not in capsys.readouterr().err
    assert main([*words, "--general", rest, "--old", rest]) == 0  # the same run: it is finished
    said = capsys.readouterr().err
    for now in ("--general is called --retain_data now", "--old is called --replay_data now"):
        assert f"deepseek: warning: {now}\n" in said
    (tmp_path / "tune.yaml").write_text(f"general: {rest}\nold: [{rest}]\n")
    assert main([*words, "--config", str(tmp_path / "tune.yaml")]) == 0
    said = capsys.readouterr().err
    for now in ("`general` is called `retain_data` now",
                "`old` is called `replay_data` now"):
        assert f"deepseek: warning: {now}\n" in said
    (tmp_path / "tune.yaml").write_text("old: nowhere\n")
    assert main([*words, "--config", str(tmp_path / "tune.yaml"), "--retain_data", rest, "--replay_data", rest]) == 0
    for former, name in (("general", "retain_data"), ("old", "replay_data")):
        assert main([*words, f"--{former}", rest, f"--{name}", rest]) == 2
        given: dict[str, Any] = {former: rest}
        both = given | {name: rest}
        assert f"{name} and {former}: are two names of one setting: leave out {former}" in capsys.readouterr().err
        with pytest.raises(ConfigError, match=f"{name} and {former}: are two names"):
            MoEFineTuner(model, replay=0.2, **both)
        with pytest.warns(DeprecationWarning, match=f"{former} is called {name} now") as noted:
            tuner = MoEFineTuner(model, replay=0.2, **given)
        assert getattr(tuner, name) == rest and noted[0].filename == __file__


def test_variables_of_the_template_are_the_same_from_flag_yaml_and_python(
    base: Callable[..., Path], files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, (law, rest), out = base(), files, tmp_path / "out"
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'assistant' and thinking %}<think>{% endif %}{{ m.content }}"
        "{% endfor %}{{ style }}")
    words = ["tune", str(model), law, "--retain_data", rest, "--out", str(out), "--expert_tune", "law_expert", *QUICK]
    flag = ["--chat_template_kwargs", '{"thinking": true, "style": [1]}']
    assert main([*words, *flag]) == 0
    fingerprint = json.loads((out / "settings.json").read_text())["data"]["fingerprint"]
    (tmp_path / "tune.yaml").write_text("chat_template_kwargs: {thinking: true, style: [1]}\n")
    assert main([*words, "--config", str(tmp_path / "tune.yaml")]) == 0  # the same run goes on: it is finished
    settings: dict[str, Any] = {"lr": 3e-3, "batch_size": 4, "max_length": 64, "eval_records": 8, "steps": 2}
    tuner = MoEFineTuner(model, retain_data=Path(rest), out=out, expert_tune=["law_expert"],
                         chat_template_kwargs={"style": (1,), "thinking": True}, **settings)
    tuner.fit(Path(law))
    assert json.loads((out / "settings.json").read_text())["data"]["fingerprint"] == fingerprint
    capsys.readouterr()
    for other in (words, [*words, *flag, "--parse_special"]):
        assert main(other) == 2
        assert "holds a run with" in capsys.readouterr().err
    for given, message in (('{"thinkin": 1}', "chat_template_kwargs: 'thinkin' is no variable"),
                           ('{"messages": []}', "chat_template_kwargs: 'messages' is no variable")):
        assert main([*words, "--chat_template_kwargs", given]) == 2
        assert message in capsys.readouterr().err
    for given in ("[1]", "{thinking: true}"):
        assert main([*words, "--chat_template_kwargs", given]) == 2
        assert "must be an object of JSON values" in capsys.readouterr().err


def test_an_adapter_by_flag_yaml_and_python_and_by_the_older_names(
    base: Callable[..., Path], files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, (law, rest) = str(base()), files
    file = tmp_path / "tune.yaml"

    def tuned(out: str, *words: str, yaml: str = "") -> bytes:
        file.write_text(f"model: {model}\ndata: {law}\nretain_data: {rest}\nout: {tmp_path / out}\n{yaml}")
        assert main(["tune", "--config", str(file), *QUICK, *words]) == 0
        return (tmp_path / out / "adapter" / "moe_dr_adapter.safetensors").read_bytes()

    fields: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "v_proj"], "experts": ["law_expert", "1.0"]}
    table = "{r: 2, target_modules: [q_proj, v_proj], experts: [law_expert, '1.0']}\n"
    first = tuned("a", "--adapter", "r=2", "target_modules=q_proj,v_proj", "experts=law_expert,1.0")
    assert first == tuned("b", yaml=f"adapter: {table}")
    assert first == tuned("c", "--adapter", "r=2", yaml=f"adapter: {table.replace('r: 2', 'r: 5')}")  # the flag wins
    settings: dict[str, Any] = {"lr": 3e-3, "batch_size": 4, "max_length": 64, "eval_records": 8, "steps": 2}
    for out, adapter in (("d", fields), ("e", LoRAAdapter(**fields))):
        MoEFineTuner(model, adapter=adapter, retain_data=Path(rest), out=tmp_path / out, **settings).fit(Path(law))
        assert (tmp_path / out / "adapter" / "moe_dr_adapter.safetensors").read_bytes() == first
    capsys.readouterr()
    assert first == tuned("f", yaml=f"lora: {table}")
    assert "deepseek: warning: `lora` is called `adapter` now\n" in capsys.readouterr().err
    older = ["--r", "2", "--target_modules", "q_proj", "v_proj", "--lora_experts", "law_expert", "1.0"]
    assert first == tuned("g", *older)
    said = capsys.readouterr().err
    for now in ("--r is called --adapter r=2", "--target_modules is called --adapter target_modules=q_proj,v_proj",
                "--lora_experts is called --adapter experts=law_expert,1.0"):
        assert f"deepseek: warning: {now} now\n" in said


def test_a_pipe_is_learnt_round_by_round(
    base: Callable[..., Path], files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in records(20)) + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main(["tune", str(base()), "-", "--retain_data", files[1], "--out", str(tmp_path / "a"),
                 "--expert_tune", "auto", "--records_a_round", "10", *QUICK]) == 0
    assert "2 rounds: backward transfer" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO('{"input": 1\n'))
    assert main(["tune", str(base()), "-", "--retain_data", files[1], "--out", str(tmp_path / "b")]) == 2
    assert "standard input:1: not JSON" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "yaml", "message"), [
    ([], "model: MODEL\n", "model and data must be given"),
    (["MODEL", "LAW", "--expert_tune", "lawyer"], None,
     "no experts are named 'lawyer'; there are text_expert, code_expert, math_expert, law_expert"),
    (["MODEL", "nowhere.jsonl"], None, "nowhere.jsonl"),
    (["MODEL", "LAW", "--rounds", "2"], None, "rounds = 2: has a meaning only for records on standard input"),
    (["MODEL", "LAW"], "records_a_round: 9\n", "records_a_round = 9: has a meaning only for records on standard input"),
    (["nowhere", "LAW"], None, "nowhere: no such folder here"),
    (["MODEL", "LAW"], "learning_rate: 3\n", "unknown setting learning_rate"),
    (["MODEL", "LAW"], "adapter: {rank: 3}\n", "adapter: unknown setting rank; there are r, "),
    (["MODEL", "LAW"], "adapter: 3\n", "adapter = 3: must be a LoRAAdapter, or a table of its fields"),
    (["MODEL", "LAW"], "adapter: [r]\n", "adapter = ['r']: must be a LoRAAdapter, or a table of its fields"),
    (["MODEL", "LAW"], "adapter: runs/x\n", "(an adapter is trained from its start: merge a trained one into the"),
    (["MODEL", "LAW"], "adapter: {lora_alpha: x}\n", "lora_alpha = 'x': must be a positive number"),
    (["MODEL", "LAW"], "adapter: {r: 2}\nlora: {r: 2}\n", "adapter and lora: are two names of one setting"),
    (["MODEL", "LAW", "--adapter", "rr=2"], None, "adapter = 'rr=2': must read FIELD=VALUE, and the fields are r, "),
    (["MODEL", "LAW", "--adapter", "MODEL"], None, "to go on from a trained adapter, merge it first"),
    (["MODEL", "LAW", "--adapter", "r=two"], None, "adapter: r = 'two': must be a number"),
    (["MODEL", "LAW", "--adapter", "r=2", "r=3"], None, "adapter: r is given twice"),
    (["MODEL", "LAW", "--adapter", "lora_alpha=nan"], None, "lora_alpha = nan: must be a positive number"),
    (["MODEL", "LAW"], "model_path: x\n", "device, threads, adapter; did you mean model?"),
    (["MODEL", "LAW"], "chat_template_kwargs: 3\n", "chat_template_kwargs = 3: must be an object of JSON values"),
    (["MODEL", "LAW"], "chat_template_kwargs: {date: 2026-01-01}\n", "must be an object of JSON values"),
    (["MODEL", "nowhere.jsonl"], "chat_template_kwargs: {thinking: true}\n", "'thinking' is no variable that the chat"),
    (["MODEL", "LAW"], "- 3\n", "must be a table of settings"),
    (["MODEL", "LAW", "--adapter", "r=4", "target_modules=query"], None, "target_modules = 'query': matches nothing"),
    (["MODEL", "LAW", "--max_length", "8"], None, "40 of 40 records are longer than max_length = 8 tokens"),
    (["MODEL", "EMPTY"], None, "empty"),
])
def test_bad_input_is_one_line(
    base: Callable[..., Path], files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    words: list[str], yaml: str | None, message: str
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    names = {"MODEL": str(base()), "LAW": files[0], "EMPTY": str(tmp_path / "empty.jsonl")}
    words = [names.get(word, word) for word in words]
    if yaml is not None:
        (tmp_path / "tune.yaml").write_text(yaml.replace("MODEL", names["MODEL"]))
        words += ["--config", str(tmp_path / "tune.yaml")]
    assert main(["tune", *words, "--out", str(tmp_path / "out")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("deepseek: ")]
    assert message in line


def test_what_another_process_writes_is_left_alone(
    base: Callable[..., Path], files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = str(base()), tmp_path / "new" / "out"
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with locked(out):
        for data in (files[0], "-"):
            assert main(["tune", model, data, "--out", str(out)]) == 2
            assert f"deepseek: {out}: another process is writing it\n" in capsys.readouterr().err
    assert not out.parent.exists()


def test_every_setting_has_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["tune", "--help"])
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in TuneConfig.__dataclass_fields__)


def test_what_is_learnt_is_shown_and_nothing_is_trained(
    base: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data, out = str(base()), tmp_path / "a.jsonl", tmp_path / "out"
    rows = [{"messages": [{"role": "user", "content": "pay?"}, {"role": "assistant", "content": "4\ncoins", "reasoning":
                                                                "law"}], "id": 7},
            {"question": "q", "answer": float("nan")}, {"messages": [{"role": "user", "content": "pay?"}]},
            {"input": "act?", "output": '"pay"', "weight": 0}, {"input": "act?", "output": '"pay" \u4f60'}]
    write_jsonl(data, rows)
    assert main(["tune", model, str(data), "--out", str(out), "--show_records", "3"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{data}:1: ") and first.endswith(" of them learnt")
    assert lines[:2] == ["  - <|begin_of_sentence|><|User|>pay?<|Assistant|>",
                         r"  + <think>\nlaw\n</think>\n\n4\ncoins<|end_of_sentence|>"]
    assert lines[2] == f"{data}:3: the record has no output to learn (no turn of an assistant) (refused)"
    assert lines[4:6] == ["  - <|begin_of_sentence|><|User|>act?<|Assistant|>", '  + "pay" \u4f60<|end_of_sentence|>']
    assert lines[6:] == [f"{data}:2: unusable record: answer = nan: must be a number that JSON has, a text or null",
                         "keys of records that were not used: id (1)", "left out: 1 records that ask not to be learnt"]
    (tmp_path / "tune.yaml").write_text(f"model: {model}\ndata: {data}\nmap: {{prompt: input, answer: output}}\n"
                                        "show_records: 9\n")
    assert main(["tune", "--config", str(tmp_path / "tune.yaml"), "--out", str(out)]) == 0
    assert "there is no column 'input'" in capsys.readouterr().out
    (tmp_path / "map.yaml").write_text("messages: messages\n")
    assert main(["tune", model, str(data), "--map", str(tmp_path / "map.yaml"), "--reasoning", "drop",
                 "--show_records", "1"]) == 0
    assert "law" not in capsys.readouterr().out
    assert not out.exists()
    for words, message in ((["--show_records", "0"], "show_records = 0: must be an integer >= 1"),
                           (["--map", str(data)], "a.jsonl: "), (["--reasoning", "keep"], "reasoning = 'keep'")):
        assert main(["tune", model, str(data), *words]) == 2
        assert message in capsys.readouterr().err


def test_records_that_are_mapped_and_counted(
    base: Callable[..., Path], files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = str(base()), tmp_path / "out"
    rows = [{"q": row["input"], "a": row["output"], "id": n} for n, row in enumerate(records(20))]
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "map.yaml").write_text("prompt: q\nanswer: a\n")
    words = ["--retain_data", files[1], "--out", str(out), "--expert_tune", "law_expert"]
    words += ["--map", str(tmp_path / "map.yaml")]
    assert main(["tune", model, str(tmp_path / "a.jsonl"), *words, *QUICK]) == 0
    note = "keys of records that were not used: id (20)"
    assert note in capsys.readouterr().out.splitlines()
    report = json.loads((out / "report.json").read_text())
    assert report["learnt_tokens"] == report["loss_tokens"] > 0  # the former name, too
    assert report["notes"] == [note] and report["examples"] < 20
    lines = "".join(json.dumps(row) + "\n" for row in [*rows, {"q": "x", "a": float("nan")}, {"q": "y"}])
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    words[words.index(str(out))] = str(tmp_path / "stream")
    assert main(["tune", model, "-", *words, "--records_a_round", "10", *QUICK]) == 0
    assert "2 records could not be used" in capsys.readouterr().out
    refused = (tmp_path / "stream" / "refused.jsonl").read_text().splitlines()
    assert "NaN" not in refused[0] and "a = nan" in json.loads(refused[0])["reason"]
    assert json.loads(refused[1])["record"] == {"q": "y"}


def test_plain_text_is_learnt_as_documented(
    base: Callable[..., Path], files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/tuning.md: files of text, and a single one, whose last windows are held out."""
    model = str(base())
    (tmp_path / "statutes").mkdir()
    for number in range(6):
        (tmp_path / "statutes" / f"{number}.txt").write_text(f"Section {number} of the act says: pay coins. " * 20)
    quick = ["--retain_data", files[1], "--max_length", "64", "--epochs", "2", "--batch_size", "2"]
    assert main(["tune", model, *map(str, sorted((tmp_path / "statutes").glob("*.txt"))), "--expert_tune", "law_expert",
                 "--out", str(tmp_path / "a"), *quick]) == 0
    assert "lr 0.0003, the default where experts are tuned" in capsys.readouterr().out
    report = MoEFineTuner(model, expert_tune="law_expert", max_length=64, batch_size=2, out=tmp_path / "b",
                          retain_data=Path(files[1])).fit(str(tmp_path / "statutes"), epochs=2)
    told = json.loads((tmp_path / "a" / "report.json").read_text())
    assert told["domain_after"] == report.domain_after and told["held_out"] == report.held_out == 2
    assert main(["tune", model, str(tmp_path / "statutes" / "0.txt"), "--expert_tune", "law_expert", "--out",
                 str(tmp_path / "c"), *quick]) == 0
    said = capsys.readouterr().out
    assert "of 1 records; the end of one is held out" in said
    assert "1 held-out document: too few to tell whether this is more than noise" in said
