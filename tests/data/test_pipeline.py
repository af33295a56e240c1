"""Every step alone and all in a row: nothing is lost, nothing is done twice, a killed run leaves nothing half."""

from __future__ import annotations

import csv
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek import cli
from deepseek.data import Document, TokenShards, stages
from deepseek.data import validate as reading
from deepseek.data.pipeline import ORDER, run
from deepseek.data.records import COLUMNS, read_tables, to_documents, to_table
from deepseek.data.report import report
from deepseek.data.settings import (
    DedupSettings,
    LabelSettings,
    PackSettings,
    PipelineConfig,
    SplitSettings,
    ValidateSettings,
)
from deepseek.data.stage import run_stage
from deepseek.errors import ConfigError, DataError, NotFoundError
from tests.helpers.jsonl import write_jsonl

LAW = "The court of {} heard the plaintiff, and the defendant of {} lost the lawsuit for breach of contract {}."
CODE = "def f_{}(x):\n    import json_{}\n    return lambda y: x[{}] + y  # self.value"
PLAIN = "In the garden of {} stood {} apple trees, {} of them in flower, and a bench for whoever came by."


def texts(shape: str, count: int, start: int = 0) -> list[str]:
    return [shape.format(i * 7919, (i + 3) ** 3, i * i + 11) for i in range(start, start + count)]


def records(folder: Path) -> list[Document]:
    return [document for table in read_tables(folder) for document in to_documents(table)]


# ---- records ----------------------------------------------------------------------------------------------------


def test_documents_survive_the_table() -> None:
    given = [Document("a\nb", "x.jsonl", 3, (), "law_expert", {"complexity": "中级", "n": [1]}, 2),
             Document("User: q", "y", None, (("user", "q"),)), Document("这是中文", "z", 1)]
    table = to_table(given)
    assert table.columns == list(COLUMNS)
    assert list(to_documents(table)) == given
    assert table["language"].to_list() == ["other", "other", "zh"]
    assert table["complexity"].to_list() == ["中级", None, None]
    assert table["label_source"].to_list() == ["given", None, None]
    assert to_table([]).schema == table.schema


# ---- validate ---------------------------------------------------------------------------------------------------

LINES = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), max_size=20).map(
        lambda text: json.dumps({"text": text})),
    st.sampled_from(['{"question": "q", "answer": "a"}', '{"question": "q"}', "[]", "17", "{", '"bare"', "null", "",
                     '{"text": "x", "expert": "law_expert"}', '{"text": "x", "expert": "no_expert"}',
                     '{"text": "\\ud800"}', '{"text": "\\u0000\\u0001\\u0002x"}', "\udcff{}", '{"messages": ["hi"]}']))


@given(st.lists(LINES, min_size=1, max_size=12))
@settings(max_examples=40, deadline=None)
def test_read_is_kept_plus_quarantined(lines: list[str]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "a.jsonl"
        data.write_bytes("\n".join(['{"text": "always good"}', *lines]).encode("utf-8", "surrogateescape"))
        done = stages.validate([data], Path(place) / "out", ValidateSettings(min_characters=2),
                              experts=["law_expert"])
        full = [number for number, line in enumerate(["x", *lines], 1) if line.strip()]
        good = [document.line for document in records(Path(place) / "out")]
        bad = [json.loads(line) for line in (Path(place) / "out" / "quarantine.jsonl").read_bytes().splitlines()]
        assert done.counts["read"] == done.counts["kept"] + done.counts["quarantined"] == len(full)
        assert sorted(good + [one["line"] for one in bad]) == full
        assert (done.counts["kept"], done.counts["quarantined"]) == (len(good), len(bad))
        assert sum(done.counts["reasons"].values()) == len(bad)
        for one in bad:
            assert set(one) == {"source", "line", "reason", "detail", "raw"}
            assert one["source"] == str(data) and one["reason"] and one["raw"]


def test_each_reason_has_its_name(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [
        {"text": "fine words"}, {"text": "x"}, {"text": "y" * 99}, {"text": "a\x00\x01b"},
        {"text": "fine too", "expert": "chef"}, {"none": 1}])
    done = stages.validate([path], tmp_path / "out", ValidateSettings(min_characters=2, max_characters=50),
                          experts=["law_expert", "code_expert"])
    assert done.counts["reasons"] == {"unusable record": 1, "too short": 1, "too long": 1, "damaged text": 1,
                                      "unknown expert": 1}
    quarantine = (tmp_path / "out" / "quarantine.jsonl").read_text()
    assert "'chef', must be one of law_expert, code_expert" in quarantine
    assert json.loads(quarantine.splitlines()[0])["raw"] == '{"none": 1}'


def test_keys_that_mean_nothing_and_records_left_out_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": f"words {n}", "id": n, "lang": "en"} for n in range(5)]
    rows += [{"text": "words", "weight": 0}, {"question": "q", "answer": float("nan")}, {"text": "t", "answer": "a"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert cli.main(["data", "validate", str(path), "--out", str(tmp_path / "validate")]) == 0
    said = capsys.readouterr().out
    assert "left out: 1 records that ask not to be learnt\nkeys of records that were not used: id (5)\n" in said
    counts = json.loads((tmp_path / "validate" / "step.json").read_text())["counts"]
    assert (counts["kept"], counts["quarantined"], counts["unused"]) == (5, 2, {"id": 5})
    first, second = map(json.loads, (tmp_path / "validate" / "quarantine.jsonl").read_text().splitlines())
    assert first["line"] == 7 and first["detail"].startswith("answer = nan: ")
    assert second["line"] == 8 and "two readings, text alone or with answer" in second["detail"]
    report(tmp_path / "validate", tmp_path / "report")
    assert "keys of records that were not used: id (5)" in (tmp_path / "report" / "report.txt").read_text()


def test_pieces_of_a_file_and_processes_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [
        {"text": text} if i % 9 else {"bad": i} for i, text in enumerate(texts(PLAIN, 400))])
    whole = stages.validate([path], tmp_path / "whole").counts
    monkeypatch.setattr(reading, "UNIT", 3001)
    pieces = stages.validate([path], tmp_path / "pieces").counts
    assert pieces == whole
    assert len(list((tmp_path / "pieces").glob("part-*"))) > 5
    assert records(tmp_path / "pieces") == records(tmp_path / "whole")
    assert len({(tmp_path / name / "quarantine.jsonl").read_text() for name in ("pieces", "whole")}) == 1


@pytest.mark.slow
def test_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [write_jsonl(tmp_path / "in" / f"{i}.jsonl", [{"text": text} for text in texts(PLAIN, 50, i * 50)])
             for i in range(4)]
    monkeypatch.setattr(reading, "SMALL", 0)
    assert stages.validate(files, tmp_path / "two", workers=2).counts["kept"] == 200
    monkeypatch.setattr(reading, "SMALL", 1 << 30)
    stages.validate(files, tmp_path / "one", workers=2)
    assert records(tmp_path / "two") == records(tmp_path / "one")


def test_a_place_without_records_is_an_error(tmp_path: Path) -> None:
    good = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match="nowhere: no such file or folder"):
        stages.validate([good, tmp_path / "nowhere"], tmp_path / "out")
    with pytest.raises(DataError, match="empty: the folder holds no file"):
        stages.validate([good, tmp_path / "empty"], tmp_path / "out")
    bad = write_jsonl(tmp_path / "b.jsonl", [{"no": 1}])
    with pytest.raises(DataError, match=r"b\.jsonl: holds no usable record; .*b\.jsonl:1: unusable record"):
        stages.validate([good, bad], tmp_path / "out")
    with pytest.raises(ConfigError, match="expert = 'chef': must be one of law_expert"):
        stages.validate({"chef": [good]}, tmp_path / "out", experts=["law_expert"])
    assert not (tmp_path / "out").exists()


# ---- a step -----------------------------------------------------------------------------------------------------


def test_a_stage_is_not_done_twice_and_leaves_nothing_half(tmp_path: Path) -> None:
    out, ran = tmp_path / "out", []

    def work(folder: Path) -> dict[str, Any]:
        (folder / "x").write_text("x")
        ran.append(1)
        return {"n": len(ran)}

    def fail(folder: Path) -> dict[str, Any]:
        (folder / "half").write_text("x")
        raise DataError("no")

    assert run_stage("s", out, [1], work).counts == {"n": 1}
    again = run_stage("s", out, [1], work)
    assert (again.ran, again.counts) == (False, {"n": 1})
    with pytest.raises(DataError, match="no"):
        run_stage("s", out, [2], fail)
    assert not (out / "half").exists()
    for stale in (".out.0123abcd", "..out.0123abcd.0123abcd"):  # what SIGKILL leaves of a step, and of packing in it
        (tmp_path / stale).mkdir()
    (tmp_path / ".out.config").mkdir()
    assert run_stage("s", out, [2], work).counts == {"n": 2}
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.config", "out"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="mine: is not empty and not the result of a stage"):
        run_stage("s", tmp_path / "mine", [1], work)


def test_two_at_once_are_told_apart(tmp_path: Path) -> None:
    def work(folder: Path) -> dict[str, Any]:
        with pytest.raises(ConfigError, match="another process is writing it"):
            run_stage("s", tmp_path / "out", [2], lambda _: {})
        return {}

    assert run_stage("s", tmp_path / "out", [1], work).ran


# ---- the later steps --------------------------------------------------------------------------------------------


def test_dedup_lists_what_it_drops(tmp_path: Path) -> None:
    said = texts(LAW, 20)
    near = said[3].replace("contract", "contrast")
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in [*said, said[0].upper(), near]])
    stages.validate([path], tmp_path / "v")
    done = stages.dedup(tmp_path / "v", tmp_path / "d")
    assert {key: done.counts[key] for key in ("read", "kept", "exact", "near")} == {
        "read": 22, "kept": 20, "exact": 1, "near": 1}
    assert [document.text for document in records(tmp_path / "d")] == said
    with (tmp_path / "d" / "dropped.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["line"], row["kind"], row["kept_line"]) for row in rows] == [("21", "exact", "1"), ("22", "near", "4")]
    assert 0.8 <= float(rows[1]["similarity"]) < 1
    assert stages.dedup(tmp_path / "v", tmp_path / "e", DedupSettings(exact_only=True)).counts["near"] == 0


def test_labels_come_from_the_surest_source(tmp_path: Path) -> None:
    given = [{"text": text, "expert": "law_expert"} for text in texts(LAW, 40)]
    given += [{"text": text, "expert": "garden_expert"} for text in texts(PLAIN, 40)]
    free = [{"text": texts(CODE, 1)[0]}, {"text": texts(PLAIN, 1, 900)[0]}, {"text": "?"}]
    path = write_jsonl(tmp_path / "a.jsonl", [*given, *free, {"text": texts(CODE, 1, 5)[0], "expert": "law_expert"}])
    stages.validate([path], tmp_path / "v")
    done = stages.label(tmp_path / "v", tmp_path / "l", LabelSettings(confidence=0.7))
    table = pl.concat(list(read_tables(tmp_path / "l")))
    assert table["expert"].to_list()[80:] == ["code_expert", "garden_expert", None, "law_expert"]
    assert table["label_source"].to_list()[80:] == ["rules", "classifier", None, "given"]
    assert table["confidence"].is_null().to_list()[80:82] == [True, False]
    assert done.counts["by_source"] == {"given": 81, "rules": 1, "classifier": 1, "unlabelled": 1}
    assert done.counts["classifier"]["names"] == ("garden_expert", "law_expert")
    assert done.counts["rules"]["law_expert"]["right"] > 0.9
    reused = stages.label(tmp_path / "v", tmp_path / "m", LabelSettings(
        classifier=str(tmp_path / "l" / "classifier.npz"), rules="none", confidence=0.0))
    assert reused.counts["by_source"] == {"given": 81, "classifier": 3}
    few = stages.label(tmp_path / "v", tmp_path / "n", LabelSettings(), experts=["law_expert", "code_expert"])
    assert few.counts["classifier"]["trained"] is False
    with pytest.raises(ConfigError, match="expert = 'garden_expert': must be one of law_expert"):
        stages.label(tmp_path / "v", tmp_path / "x", LabelSettings(classifier=str(tmp_path / "l" / "classifier.npz")),
                    experts=["law_expert"])


def test_split_and_pack_hold_out_the_same(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text, "expert": name} for name, shape in (
        ("law_expert", LAW), ("code_expert", CODE), (None, PLAIN)) for text in texts(shape, 60)])
    stages.validate([path], tmp_path / "v")
    how = SplitSettings(valid_fraction=0.2, seed=3)
    done = stages.split(tmp_path / "v", tmp_path / "s", how)
    assert {(p.parent.parent.name, p.parent.name) for p in (tmp_path / "s").rglob("*.parquet")} == {
        (name, side) for name in ("law_expert", "code_expert", "unlabelled") for side in ("train", "valid")}
    assert sum(sides["train"] + sides["valid"] for sides in done.counts["by_expert"].values()) == 180
    packed = stages.pack(tmp_path / "s", tmp_path / "p", PackSettings(vocab_size=300), held_out=how)
    shards = TokenShards.open(tmp_path / "p")
    assert shards.experts == ("code_expert", "law_expert")
    assert packed.counts["records"] == 180
    from deepseek.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(tmp_path / "p" / "tokenizer")
    held = tokenizer.decode(np.fromfile(tmp_path / "p" / "valid.bin", shards.about["dtype"]).tolist())
    valid = [document.text for name in ("code_expert", "law_expert", "unlabelled")
             for document in records(tmp_path / "s" / name / "valid")]
    assert valid and all(text in held for text in valid)
    labels = np.fromfile(tmp_path / "p" / "train.experts.bin", np.uint8)
    assert set(labels.tolist()) == {0, 1, 255}


def test_pack_reads_files_by_a_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = [(text, name) for name, shape in (("law_expert", LAW), ("code_expert", CODE)) for text in texts(shape, 40)]
    odd = write_jsonl(tmp_path / "odd.jsonl", [{"verdict": text, "kind": name} for text, name in said])
    (tmp_path / "map.yaml").write_text("text: verdict\nexpert: kind\n")
    write_jsonl(tmp_path / "plain.jsonl", [{"text": text, "expert": name} for text, name in said])
    stages.validate([tmp_path / "plain.jsonl"], tmp_path / "v")
    flags = ["--vocab_size", "300", "--valid_fraction", "0.2"]
    assert cli.main(["data", "pack", str(tmp_path / "v"), "--out", str(tmp_path / "a"), *flags]) == 0
    words = ["data", "pack", str(odd), "--map", str(tmp_path / "map.yaml"), "--out", str(tmp_path / "b"), *flags]
    assert cli.main(words) == 0
    first, second = (TokenShards.open(tmp_path / name) for name in "ab")
    assert first.fingerprint == second.fingerprint and second.experts == ("code_expert", "law_expert")
    capsys.readouterr()
    assert cli.main(words) == 0 and "(unchanged)" in capsys.readouterr().out
    (tmp_path / "map.yaml").write_text("text: verdict\n")
    assert cli.main(words) == 0 and "(unchanged)" not in capsys.readouterr().out
    assert TokenShards.open(tmp_path / "b").experts == ()
    (tmp_path / "map.yaml").write_text("txt: verdict\n")
    assert cli.main(words) == 2 and "map.yaml: map: unknown key 'txt'" in capsys.readouterr().err
    assert cli.main(["data", "tokenizer", str(odd), "--vocab_size", "300", "--out", str(tmp_path / "t")]) == 2
    (tmp_path / "map.yaml").write_text("text: verdict\n")
    assert cli.main(["data", "tokenizer", str(odd), "--vocab_size", "300", "--out", str(tmp_path / "t"), "--map",
                     str(tmp_path / "map.yaml")]) == 0


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []
        self.drawings = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.outside += [f"{k}={v}" for k, v in attrs if k in ("src", "href", "xlink:href") and v]
        self.drawings += tag == "svg"
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_counts_and_its_page_stands_alone(tmp_path: Path) -> None:
    said = [{"input": text[:20], "output": text[20:], "metadata": {"complexity": "中级", "language": "Python"},
             "expert": "code_expert"} for text in texts(CODE, 10)]
    path = write_jsonl(tmp_path / "a.jsonl",
                       [*said, *({"text": text} for text in [*texts(LAW, 5), "x=1"]), {"bad <b>": 1}])
    stages.validate([path], tmp_path / "validate")
    stages.split(tmp_path / "validate", tmp_path / "split")
    done = report(tmp_path / "split", tmp_path / "report")
    assert done.counts == {"records": 16, "experts": {"code_expert": 10, "unlabelled": 6}}
    told = json.loads((tmp_path / "report" / "report.json").read_text())["experts"]["code_expert"]
    assert told["complexity"] == {"中级": 10}
    assert told["language"] == {"Python": 10}
    assert told["form"] == {"question and answer": 10}
    assert sum(told["lengths"]) == 10
    assert told["characters"] == sum(len(one["input"]) + len(one["output"]) + 1 for one in said)
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    parser = _Page()
    parser.feed(page)
    assert not parser.open and not parser.outside and parser.drawings == 6
    assert not re.search(r"https?://|@import|url\(", page)
    assert "prefers-color-scheme: dark" in page
    drawings = re.findall(r'aria-label="(?:language|complexity|form) by expert">(.*?)</svg>', page, re.DOTALL)
    bars = [sum(float(width) for width in re.findall(r' width="([\d.]+)" height="20"', one)) for one in drawings]
    assert bars == pytest.approx([2 * 640] * 3, abs=0.5), "the parts of a bar are the whole bar"
    assert "1 unusable record" in (tmp_path / "report" / "report.txt").read_text()


# ---- all in a row -----------------------------------------------------------------------------------------------


def config(tmp_path: Path, **more: Any) -> Path:
    write_jsonl(tmp_path / "law" / "a.jsonl", [{"text": text} for text in [*texts(LAW, 60), *texts(LAW, 9)]])
    write_jsonl(tmp_path / "code.jsonl", [{"text": text} for text in texts(CODE, 60)])
    write_jsonl(tmp_path / "mixed.jsonl", [{"text": text} for text in [*texts(LAW, 10, 500), *texts(CODE, 10, 500)]])
    keys = {"out": str(tmp_path / "run"), "pack": {"vocab_size": 300}, "split": {"valid_fraction": 0.1}, "sources": {
        "law_expert": [str(tmp_path / "law")], "code_expert": str(tmp_path / "code.jsonl"),
        "": [str(tmp_path / "mixed.jsonl")]}}
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(keys | more))  # JSON is YAML
    return path


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = config(tmp_path)
    going = run(PipelineConfig.load(path))
    assert [next(going)[0] for _ in range(3)] == list(ORDER[:3])
    del going  # stopped here
    again = list(run(PipelineConfig.load(path)))
    assert [(name, done.ran) for name, done in again] == [
        ("validate", False), ("dedup", False), ("label", False), ("split", True), ("pack", True), ("report", True)]
    counts = {name: done.counts for name, done in again}
    assert counts["validate"]["kept"] == 149
    assert counts["dedup"]["exact"] == 9
    assert counts["label"]["by_expert"]["code_expert"] >= 60
    assert counts["pack"]["records"] == counts["dedup"]["kept"]
    assert [done.ran for _, done in run(PipelineConfig.load(path))] == [False] * len(ORDER)
    os.utime(tmp_path / "code.jsonl", ns=(1, 1))
    assert [done.ran for _, done in run(PipelineConfig.load(path))] == [True] * len(ORDER)
    changed = config(tmp_path, split={"valid_fraction": 0.2})
    assert [name for name, done in run(PipelineConfig.load(changed)) if done.ran][-3:] == ["split", "pack", "report"]


@pytest.mark.parametrize(("keys", "message"), [
    ({"sorces": 1}, r"run\.yaml: unknown setting sorces; there are .*did you mean sources"),
    ({"dedup": {"treshold": 1}}, r"run\.yaml: dedup: unknown setting treshold; there are exact_only, threshold"),
    ({"dedup": {"threshold": 3}}, r"dedup: threshold = 3: must lie in \[0\.5, 1\]"),
    ({"split": [1]}, r"split = \[1\]: must be a mapping"),
    ({"experts": ["law_expert"]}, r"expert = 'code_expert': must be one of law_expert"),
    ({"sources": {"a b": "x"}}, r"expert = 'a b': must be made of letters"),
    ({"sources": {}}, "sources: must name at least one path"),
    ({"sources": {"x": 3}}, "sources: x = 3: must be a path"),
    ({"map": {"txt": 1}}, "map: unknown key 'txt'"),
    ({"workers": 0}, "workers = 0: must be an integer >= 1"),
])
def test_a_bad_key_is_named(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        PipelineConfig.load(config(tmp_path, **keys))


# ---- the command line -------------------------------------------------------------------------------------------


def test_the_steps_as_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config(tmp_path)
    at = lambda name: str(tmp_path / name)  # noqa: E731
    assert cli.main(["data", "validate", at("mixed.jsonl"), "--sources", f"law_expert={at('law')}",
                     f"code_expert={at('code.jsonl')}", "--out", at("v")]) == 0
    assert cli.main(["data", "dedup", at("v"), "--out", at("d"), "--threshold", "0.9"]) == 0
    assert cli.main(["data", "label", at("d"), "--out", at("l"), "--confidence", "0.5"]) == 0
    assert cli.main(["data", "split", at("l"), "--out", at("s"), "--valid_fraction", "0.1"]) == 0
    assert cli.main(["data", "pack", at("s"), "--out", at("p"), "--vocab_size", "300", "--valid_fraction", "0.1"]) == 0
    assert cli.main(["data", "report", at("s"), "--out", at("r")]) == 0
    printed = capsys.readouterr().out
    assert "validate: 149 read, 149 kept, 0 quarantined" in printed
    assert "calibration error" in printed
    told = "names and languages coincide: nearly all texts in en are law_expert; the classifier may learn the language"
    assert printed.count(told) == 1, "code says nothing in English"
    assert cli.main(["data", "label", at("d"), "--out", at("l"), "--confidence", "0.5"]) == 0
    assert told in capsys.readouterr().out, "also where the step is not run again"
    assert "law_expert" in printed.split("label from")[1]
    assert cli.main(["data", "dedup", at("v"), "--out", at("d"), "--threshold", "0.9"]) == 0
    assert "(unchanged)" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "message"), [
    (["validate", "{}/nowhere", "--out", "{}/o"], "nowhere: no such file or folder"),
    (["validate", "--out", "{}/o"], "at least one DATA"),
    (["validate", "--sources", "law", "--out", "{}/o"], "sources = 'law': must read NAME=PATH"),
    (["validate", "--sources", "chef={}", "--out", "{}/o", "--experts", "law_expert"], "must be one of law_expert"),
    (["dedup", "{}", "--out", "{}/o"], "holds no records"),
    (["label", "{}", "--out", "{}/o", "--confidence", "2"], "confidence = 2.0: must lie in [0, 1]"),
    (["label", "{}", "--out", "{}/o", "--rules", "{}/none.yaml"], "none.yaml: no such file"),
    (["split", "{}", "--out", "{}/o", "--valid_fraction", "1"], "valid_fraction = 1.0: must be at least 0 and below 1"),
    (["run", "{}/none.yaml"], "none.yaml: no such file"),
])
def test_one_clear_line(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", *(word.format(tmp_path) for word in words)]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("deepseek: ")
    assert message in told
