"""`deepseek atlas …` as a user types it: what it writes, what it says, and one clear line for what it cannot do."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deepseek import Atlas, load_model, save_model
from deepseek.atlas import NamedGroup
from deepseek.atlas.atlas import Shape
from deepseek.cli import main
from deepseek.data import Document
from deepseek.ids import ExpertSet
from deepseek.tokenizer import Tokenizer
from tests.helpers.jsonl import write_jsonl
from tests.helpers.planted import LETTERS, Planted, text

FLAGS = ("--threshold", "0.9", "--seq_len", "32", "--tokens", "1500")


@pytest.fixture
def model(planted: Planted, tmp_path: Path) -> Path:
    """A copy of the planted checkpoint, to write beside."""
    return Path(shutil.copytree(planted.folder, tmp_path / "model"))


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Path]:
    """A JSONL file of each name, and one of all letters."""
    documents: dict[str, list[Document]] = {name: text(name) for name in LETTERS}
    documents["mixed"] = [document for name in LETTERS for document in text(name, 8, seed=2)]
    files = {name: tmp_path / f"{name}.jsonl" for name in documents}
    for name, file in files.items():
        write_jsonl(file, ({"text": document.text} for document in documents[name]))
    return files


@pytest.fixture
def deepseek(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*words: object) -> tuple[int, str, str]:
        status = main(["atlas", *map(str, words)])
        return status, *capsys.readouterr()

    return run


Run = Callable[..., tuple[int, str, str]]


def named(data: dict[str, Path], *names: str) -> list[str]:
    return [f"{name}_expert={data[name]}" for name in names]


def test_profile_show_and_profile_again(planted: Planted, model: Path, data: dict[str, Path], deepseek: Run) -> None:
    status, out, _ = deepseek("profile", model, "--data", *named(data, "early", "late", "mixed"), *FLAGS)
    assert status == 0 and f"atlas: {model / 'atlas.json'}" in out
    assert "refused: mixed_expert: no better than chance" in out
    atlas = Atlas.load(model)
    assert atlas.names == ("early_expert", "late_expert")
    assert set(atlas["late_expert"]) == planted.experts["late"]
    [(file, digest)] = atlas.group("late_expert").measured.files
    assert file.endswith("/late.jsonl") and len(digest) == 64
    load_model(model)

    picture, written = model.parent / "map.png", model.parent / "page.html"
    status, out, _ = deepseek("show", model, "--png", picture, "--html", written)
    assert status == 0 and "early_expert  measured" in out and "overlap (Jaccard)" in out
    assert picture.read_bytes().startswith(b"\x89PNG") and "late_expert" in written.read_text()
    assert deepseek("show", model / "atlas.json")[1].split("try: ")[0] == out.split("map: ")[0]

    # another name joins what is there
    assert deepseek("profile", model, "--data", *named(data, "middle", "early"), *FLAGS)[0] == 0
    atlas = Atlas.load(model)
    assert atlas.names == ("late_expert", "middle_expert", "early_expert")
    assert [refusal.name for refusal in atlas.refused] == ["mixed_expert"]


def test_a_map_says_which_column_is_the_text(planted: Planted, model: Path, data: dict[str, Path], deepseek: Run
                                             ) -> None:
    for file in data.values():
        file.write_text(file.read_text().replace('"text"', '"verdict"'))
    (model.parent / "map.yaml").write_text("text: verdict\n")
    flags = ["--data", *named(data, "early", "late"), *FLAGS]
    status, _, said = deepseek("profile", model, *flags)
    assert status == 2 and "under a known key; it has verdict" in said
    assert deepseek("profile", model, *flags, "--map", model.parent / "map.yaml")[0] == 0
    assert set(Atlas.load(model)["late_expert"]) == planted.experts["late"]
    status, out, _ = deepseek("compare", model, model, "--data", data["early"], "--map", model.parent / "map.yaml")
    assert status == 0 and "saturation" in out


def test_one_name_alone_comes_with_a_warning(model: Path, data: dict[str, Path], deepseek: Run) -> None:
    status, out, _ = deepseek("profile", model, "--data", *named(data, "early"), *FLAGS)
    assert status == 0 and "One name alone shows that its experts are stable" in out


def test_nothing_but_chance_is_an_error_and_writes_nothing(model: Path, data: dict[str, Path], deepseek: Run) -> None:
    words = [f"{name}={data['mixed']}" for name in ("a", "b")]
    status, _, err = deepseek("profile", model, "--data", *words, *FLAGS)
    assert status == 2 and err.splitlines()[-1].startswith("deepseek: a is no better than chance: its ")
    assert "; b is no better than chance" in err and not (model / "atlas.json").exists()


def test_what_training_built_in_stays_and_gets_evidence(planted: Planted, model: Path, data: dict[str, Path],
                                                         deepseek: Run) -> None:
    config = load_model(model).config
    experts = ExpertSet(sorted(planted.experts["early"]))
    trained = NamedGroup("early_expert", "built-in", experts, evidence={"routing_accuracy": 0.875})
    Atlas(Shape.of(config), [trained]).save(model)
    before = deepseek("show", model)[1]
    assert before.splitlines()[2].split() == ["early_expert", "built-in", "8", "4", *"--------"]
    status, out, _ = deepseek("profile", model, "--data", *named(data, "early", "late"), *FLAGS)
    assert status == 0 and "stays" not in out
    atlas = Atlas.load(model)
    assert atlas.names == ("early_expert", "late_expert") and atlas["early_expert"] == experts
    early = atlas.group("early_expert")
    assert early.kind == "built-in" and early.evidence["routing_accuracy"] == 0.875
    shown = deepseek("show", model)[1]
    row, = (line.split() for line in shown.splitlines() if line.startswith("early_expert  built-in"))
    assert float(row[4][:-1]) > 95 and float(row[5][:-1]) < 5 and row[8] == "25.0%" and row.count("-") == 1
    measured = f"{early.evidence['documents']} documents, {early.evidence['tokens']:,} tokens"
    assert f"early_expert: {measured}, routing_accuracy 0.875" in shown
    # again, with text that is not its own
    wrong = f"early_expert={data['middle']}"
    status, out, _ = deepseek("profile", model, "--data", wrong, *named(data, "late"), *FLAGS)
    assert status == 0 and "early_expert is no better than chance: its 8 experts carry" in out
    assert "it stays, since training built it in" in out and Atlas.load(model)["early_expert"] == experts
    elsewhere = model.parent / "other.json"
    assert deepseek("profile", model, "--data", *named(data, "early", "late"), "--out", elsewhere, *FLAGS)[0] == 0
    assert Atlas.load(elsewhere).group("early_expert").kind == "measured"


def test_too_few_documents_are_not_called_chance(model: Path, data: dict[str, Path], deepseek: Run) -> None:
    few = model.parent / "few.jsonl"
    lines = data["mixed"].read_text().splitlines()
    few.write_text("\n".join(json.dumps({"text": "".join(json.loads(line)["text"] for line in lines[i::7])})
                             for i in range(7)))
    words = [f"{name}={few}" for name in ("a", "b")]
    status, _, err = deepseek("profile", model, "--data", *words, *FLAGS)
    assert status == 2 and err.splitlines()[-1].startswith("deepseek: a has too little evidence (7 documents): its ")
    assert "; b has too little evidence (7 documents)" in err and "no better than chance" not in err


def test_infer_and_chat_name_the_experts(planted: Planted, model: Path, capsys: pytest.CaptureFixture[str],
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """By name first, then by index; without an atlas by index alone."""
    def said(*words: str, typed: str = "") -> tuple[str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        assert main([words[0], "--model", str(model), "--max_tokens", "2", "--temperature", "0", *words[1:]]) == 0
        out = capsys.readouterr()
        return out.out, out.err

    line = r"late_expert  +(\d+) % of the slots, (\d\.\d) times even routing\n"
    prompt = "--prompt", "qrstuvwxyz" * 5
    assert "times even routing" not in said("infer", *prompt, "--show_experts")[1]
    groups = [NamedGroup(f"{name}_expert", "measured", ExpertSet(sorted(own)))
              for name, own in planted.experts.items()]
    Atlas(Shape.of(planted.model.config), groups).save(model)
    err = said("infer", *prompt, "--show_experts")[1]
    found = re.match(line, err)
    assert found and int(found[1]) > 90 and 3.5 < float(found[2]) <= 4.0
    assert err.index("early_expert") < err.index("\n\nExpert usage: ") < err.index("MaxVio")
    assert said("infer", *prompt)[1] == "", "only where it is asked for"
    out, err = said("chat", typed=f"{'qrstuvwxyz' * 5}\n/experts\n/exit\n")
    assert re.search(line, out) and "Expert usage: " in out
    assert re.match(line, err) and len(err.splitlines()) == 3, "at the end of a conversation the names alone"
    err = said("chat", "--show_experts", typed=f"{'qrstuvwxyz' * 5}\n")[1]
    assert len(re.findall(line, err)) == 1 and "Expert usage: " in err
    assert said("chat", typed="/exit\n") == ("", "")


def test_compare_follows_the_names(planted: Planted, model: Path, data: dict[str, Path], deepseek: Run) -> None:
    deepseek("profile", model, "--data", *named(data, "early", "late"), *FLAGS)
    other = load_model(model)
    with torch.no_grad():
        gate = other.moe_blocks()[2].gate
        gate.weight.copy_(gate.weight.roll(4, 0))
    moved = save_model(other, model.parent / "moved", tokenizer=planted.tokenizer)
    status, out, _ = deepseek("compare", model, moved, "--data", data["early"], "--tokens", "500")
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()[2:] if line}
    assert status == 0 and rows["1"] == ["100.0%", "0.000", "0.0000"] and float(rows["2"][0][:-1]) < 100
    assert float(rows["early_expert"][0][:-1]) > 95 > float(rows["early_expert"][2][:-1])
    same = deepseek("compare", model, model, "--data", data["early"], "--atlas", model / "atlas.json")[1]
    assert " mean      100.0%   0.000   0.0000" in same


@pytest.mark.parametrize(("words", "message"), [
    ("profile M --data early", "data = 'early': must read NAME=PATH"),
    ("profile M --data a=nowhere.txt", "nowhere.txt: no such file or folder"),
    ("profile nowhere --data a=EARLY --out x.json", "nowhere: no such folder here"),
    ("profile owner/name --data a=EARLY", "out: must be given, because owner/name is not a local folder"),
    ("profile M --data a=SHORT b=EARLY", "a: too little evidence (1 document): too little text: 1 windows"),
    ("profile M --data a=EMPTY b=EARLY", "empty"),
    ("profile M --data a=EARLY b=LATE --threshold 2", "threshold = 2.0: must lie in (0, 1]"),
    ("profile M --data a=EARLY b=LATE --seq_len 9999", "seq_len = 9999: must lie in 2..256"),
    ("profile M --data a=EARLY b=LATE --out OTHER", "holds the atlas of another model"),
    ("show M", "atlas.json: no such file; `deepseek atlas profile MODEL --data NAME=FILE …` measures"),
    ("show nowhere.json", "nowhere.json: no such folder here"),
    ("show EARLY", "not an atlas"),
    ("compare M M --data EMPTY", "empty"),
    ("compare M M --data nowhere.txt", "nowhere.txt: no such file"),
    ("compare M M --data EARLY --tokens 0", "tokens = 0"),
    ("compare M M --data EARLY --seq_len 0", "seq_len = 0: must be an integer >= 2"),
    ("compare M M --data EARLY --atlas nowhere.json", "nowhere.json: no such file"),
    ("compare M M --data EARLY --atlas OTHER", "made for another shape"),
    ("compare M SMALL --data EARLY", "the models differ in shape"),
    ("compare M FOREIGN --data EARLY", "different tokenizers"),
])
def test_one_clear_line(
    words: str, message: str, planted: Planted, model: Path, data: dict[str, Path], deepseek: Run,
    tiny_config: Callable, random_model: Callable
) -> None:
    folder = model.parent
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("abc")
    Atlas.built_in(tiny_config(), ["x"]).save(folder / "other.json")
    if "SMALL" in words:
        save_model(random_model(tiny_config(n_routed_experts=8)), folder / "small", tokenizer=planted.tokenizer)
    if "FOREIGN" in words:
        save_model(planted.model, folder / "foreign", tokenizer=Tokenizer.train(["zyxzyxzyx"], 280))
    places = {"M": model, "EARLY": data["early"], "LATE": data["late"], "EMPTY": folder / "empty.txt",
              "SHORT": folder / "short.txt", "OTHER": folder / "other.json", "SMALL": folder / "small",
              "FOREIGN": folder / "foreign"}
    given = ["=".join(str(places.get(part, part)) for part in word.split("=")) for word in words.split()]
    status, _, err = deepseek(*given)
    said = [line for line in err.splitlines() if line.startswith("deepseek: ")]
    assert status == 2 and len(said) == 1 and message in said[0]
    assert "Traceback" not in err and not (model / "atlas.json").exists()
