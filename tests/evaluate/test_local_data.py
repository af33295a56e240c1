"""Local files become the records that the harness' tasks expect; what is missing or broken is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from deepseek.errors import DataError, NotFoundError
from deepseek.evaluate.local_data import READERS, read_splits
from tests.helpers import ROOT

SHARED = ROOT.parent / "shared" / "data" / "eval"


def test_every_set_is_read(data: Path) -> None:
    read = {dataset: read_splits(data, dataset, "anatomy") for dataset in READERS}
    assert read["cais/mmlu"]["test"][2] == {
        "question": "Where is bone 2, test?", "subject": "anatomy", "answer": 2,
        "choices": ["head", "hand,\nleft", '"foot"', "back"]}
    mbpp = read["google-research-datasets/mbpp"]
    assert {split: [record["task_id"] for record in records] for split, records in mbpp.items()} == {
        "prompt": [*range(1, 11)], "test": [11, 12, 13, 14], "validation": [511, 600], "train": [601, 974]}
    pages = read["EleutherAI/wikitext_document_level"]["test"]
    assert len(pages) == 3 and all(page["page"].strip().startswith("= Title") for page in pages)
    assert all("= = Part = =" in page["page"] for page in pages)
    assert (read["aqua"]["test"][1]["choices"], read["aqua"]["test"][1]["answer"]) == (["0", "1", "2", "3", "4"], 2)


@pytest.mark.parametrize(("file", "text", "message"), [
    ("mmlu/test/anatomy_test.csv", None, r"anatomy_test\.csv: no such file"),
    ("mmlu/test/anatomy_test.csv", "What?,a,b,c,d,A\n", "the first line must be question,choice0"),
    ("mmlu/test/anatomy_test.csv", "question,choice0,choice1,choice2,choice3,answer\nWhat?,a,b,c,d,A\n",
     "line 2: must have six fields, the last an index"),
    ("mmlu/dev/anatomy_dev.csv", "question,choice0,choice1,choice2,choice3,answer\nWhat?,a,b,1\n", "line 2: must"),
    ("gsm8k/test.jsonl", '{"question": "x"}\n', "line 1: answer: must be a text"),
    ("gsm8k/test.jsonl", '\n{"question": \n', "line 2: not valid JSON"), ("gsm8k/train.jsonl", "", "no records"),
    ("mbpp/mbpp.jsonl", '{"task_id": 11, "text": "", "code": "", "test_list": ["a"]}', "11: test_list must have three"),
    ("aqua/test.jsonl", '{"question": "x", "options": ["A)1"], "correct": "A"}', "must have five options"),
    ("svamp/SVAMP.json", "{}", "must be a list"),
    ("svamp/SVAMP.json", '[{"Body": 3}]', "record 0: Body: must be a text")])
def test_what_is_missing_or_broken_is_named(data: Path, tmp_path: Path, file: str, text: str | None,
                                            message: str) -> None:
    folder = shutil.copytree(data, tmp_path / "eval")
    if text is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(text, "utf-8")
    name = {"mmlu": "cais/mmlu", "gsm8k": "openai/gsm8k", "mbpp": "google-research-datasets/mbpp"}
    top = file.partition("/")[0]
    with pytest.raises((DataError, NotFoundError), match=message):
        read_splits(folder, name.get(top, top), "anatomy")


@pytest.mark.skipif(not SHARED.is_dir(), reason="reads ../shared/data/eval")
def test_the_published_sets_are_read_whole() -> None:
    sizes = {"openai/gsm8k": 1319, "openai/openai_humaneval": 164, "google-research-datasets/mbpp": 500,
             "EleutherAI/wikitext_document_level": 62, "aqua": 254, "cmath": 600, "svamp": 1000}
    assert {dataset: len(read_splits(SHARED, dataset, None)["test"]) for dataset in sizes} == sizes
    subjects = [path.name.removesuffix("_test.csv") for path in (SHARED / "mmlu" / "test").glob("*.csv")]
    assert sum(len(read_splits(SHARED, "cais/mmlu", subject)["test"]) for subject in subjects) == 14042
