"""`deepseek eval` on local files: the harness' own tasks and JSON, another model beside it, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from deepseek.cli import main
from deepseek.engine import scoring
from deepseek.errors import ConfigError

pytest.importorskip("lm_eval", reason="needs the extra eval (lm-eval)")

TASKS = "mmlu_anatomy,gsm8k,wikitext,humaneval,aqua"


def evaluate(*words: Any) -> int:
    return main(["eval", *map(str, words)])


def test_results_are_the_harness_own(
    model_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.json"
    assert evaluate(model_folder, "--tasks", TASKS, "svamp", "--data", data, "--limit", 2, "--num-fewshot", 1,
                    "--out", out, "--log_samples") == 0
    said, found = capsys.readouterr().out, json.loads(out.read_text("utf-8"))
    assert {*found["results"]} == {*TASKS.split(","), "svamp"} and found["lm_eval_version"]
    assert found["n-samples"]["gsm8k"] == {"original": 6, "effective": 2}
    assert found["n-shot"] == {"mmlu_anatomy": 1, "gsm8k": 1, "wikitext": 1, "humaneval": 0, "aqua": 1, "svamp": 0}
    context, letter = found["samples"]["mmlu_anatomy"][0]["arguments"][1]
    assert letter == " B" and context == (
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        'Where is bone 0, dev?\nA. head\nB. hand,\nleft\nC. "foot"\nD. back\nAnswer: A\n\n'
        'Where is bone 0, test?\nA. head\nB. hand,\nleft\nC. "foot"\nD. back\nAnswer:')
    assert found["results"]["wikitext"]["word_perplexity,none"] > 1
    assert found["samples"]["humaneval"][0]["filtered_resps"][0][0].startswith("def add0(a, b):\n")
    assert "pass@1" not in found["results"]["humaneval"] and "humaneval: the programs were not run" in said
    assert "|word_perplexity|" in said and found["config"]["model_args"]["pretrained"] == str(model_folder)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_programs_run_where_that_is_asked_for(
    model_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(data, tmp_path / "eval")
    path = folder / "humaneval" / "HumanEval.jsonl"
    first, *others = path.read_text("utf-8").splitlines()
    solved = json.loads(first) | {"prompt": "def f(): return 5\n\ndef add0(*_): return f()\n\nif 0:\n    x = '''",
                                  "test": "'''\ndef check(g):\n    assert g(2, 3) == 5\n"}
    path.write_text("\n".join([json.dumps(solved), *others]) + "\n", "utf-8")
    assert evaluate(model_folder, "--tasks", "humaneval", "--data", folder, "--limit", 2, "--execute-code") == 0
    said = capsys.readouterr().out
    assert "pass@1" in said and "|  0.5|" in said and "not run" not in said


def test_two_models_answer_by_answer(
    model_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One model through our engine and through the harness' own class for transformers."""
    pytest.importorskip("accelerate", reason="needs the extra eval (accelerate)")
    out = tmp_path / "results.json"
    assert evaluate(model_folder, "--tasks", "mmlu_anatomy,wikitext,cmath", "--data", data, "--compare", model_folder,
                    "--backend", "hf", "--out", out) == 0
    assert "0 of 9 answers differ" in capsys.readouterr().out
    found = json.loads(out.with_name("results.json.difference.json").read_text("utf-8"))
    figures = {(one["task"], one["metric"]): one for one in found["figures"]}
    assert figures["mmlu_anatomy", "acc"]["difference_error"] == 0 and figures["mmlu_anatomy", "acc"]["questions"] == 6
    words = figures["wikitext", "word_perplexity"]
    assert words["value"] == pytest.approx(words["other"], rel=1e-5) and not found["differing"]
    ours, theirs = (json.loads(path.read_text("utf-8")) for path in (out, out.with_name("results.json.other.json")))
    assert ours["config"]["model_args"]["backend"] == "engine" and theirs["config"]["model_args"]["backend"] == "hf"


def test_texts_are_scored_in_windows_of_the_length_asked_for(
    model_folder: Path, data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate", reason="needs the extra eval (accelerate)")
    found = {}
    for length in (24, 1536):
        out = tmp_path / f"{length}.json"
        assert evaluate(model_folder, "--tasks", "wikitext", "--data", data, "--compare", model_folder, "--backend",
                        "hf", "--max_length", length, "--out", out) == 0
        figures = json.loads(out.with_name(f"{out.name}.difference.json").read_text("utf-8"))["figures"]
        found[length] = next(one for one in figures if one["metric"] == "word_perplexity")
        assert found[length]["value"] == pytest.approx(found[length]["other"], rel=1e-5)
    assert found[24]["value"] != pytest.approx(found[1536]["value"], rel=1e-3)


def test_a_stopped_run_goes_on(
    model_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:
    from deepseek.evaluate import language_model

    scored: list[int] = []

    def score(llm: Any, pairs: Any, **options: Any) -> Any:
        scored.append(len(pairs))
        done = scoring.score(llm, pairs[:10], **options)
        if len(pairs) > 10:
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(language_model, "score", score)
    words = [model_folder, "--tasks", "mmlu_anatomy", "--data", data, "--limit", 4, "--out", tmp_path / "out.json"]
    assert evaluate(*words) == 130 and "the answers so far are kept" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists() and len([*tmp_path.iterdir()]) == 1
    assert evaluate(*words) == 0 and scored == [16, 6]
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_answers_that_leave_no_room_in_the_context(
    model_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "short")
    config = json.loads((folder / "config.json").read_text("utf-8")) | {"max_position_embeddings": 256}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    assert evaluate(folder, "--tasks", "mmlu_anatomy,gsm8k", "--data", data) == 2
    assert "tasks: gsm8k: answers have 256 tokens: must leave room" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "message"), [
    (["--tasks", "mmlu_anatomi"], "mmlu_anatomi: there is no such task with local files; did you mean mmlu_anatomy"),
    (["--tasks", "mmlu_anatomy,mmlu_virology"], "virology_dev.csv: no such file"), ([], "tasks: must be given"),
    (["--tasks", "gsm8k", "--limit", "0"], "limit = 0: must be an integer >= 1"),
    (["--tasks", "gsm8k", "--data", "nowhere"], "data = 'nowhere': no such folder"),
    (["--tasks", "gsm8k", "--max_length", "1"], "max_length = 1: must be an integer >= 2"),
    (["--tasks", "gsm8k", "--max_length", "1537"], "max_length = 1537: must be at most the context of"),
    (["--tasks", "gsm8k", "--max_length", "256"], "gsm8k: answers have 256 tokens: must leave room in the context"),
    (["--tasks", "gsm8k", "--out", "nowhere/x.json"], "must be a file in a folder that exists"),
    (["--tasks", "gsm8k", "--compare", "nowhere"], "nowhere: no such folder"),
    (["--tasks", "gsm8k", "--compare", "nowhere.gguf"], "nowhere.gguf: no such file"),
    (["--tasks", "gsm8k", "--backend", "hf", "--adapter", "x"], "is for models that the engine runs"),
    (["--tasks", "gsm8k", "--backend", "hf", "--max_num_seqs", "4"], "max_num_seqs = 4: is for models that the engine"),
    (["--tasks", "gsm8k", "--adapter", "a=x"], "adapter = a=…: one model is measured"),
    (["--tasks", "gsm8k", "--log_samples"], "log_samples = True: has a meaning only with out")])
def test_what_is_refused_before_any_work(
    words: list[str], message: str, model_folder: Path, data: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loads(*_: Any, **__: Any) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("deepseek.cli.eval.make_llm", loads)
    given = [] if "--data" in words else ["--data", data]
    assert evaluate(model_folder, *given, *words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("execute", [False, True])
def test_a_task_that_runs_code_in_its_own_way_is_refused(execute: bool) -> None:
    """Its process_results comes before all metrics, asked for or not."""
    from deepseek.evaluate.tasks import _limit

    class Task:
        task_name, UNSAFE_CODE = "compiles", True
        _metric_fn_list: dict[str, Any] = {}

        class config:
            @staticmethod
            def process_results(*_: Any) -> None:
                raise AssertionError("it is run")

    with pytest.raises(ConfigError, match="tasks: compiles: runs generated code in its own way"):
        _limit(Task(), execute)


def test_answers_so_far_are_no_pickle(model_folder: Path, data: Path, tmp_path: Path,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle")

    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "dumps", refuse)
    assert evaluate(model_folder, "--tasks", "mmlu_anatomy,cmath", "--data", data, "--limit", 2,
                    "--out", tmp_path / "out.json") == 0
