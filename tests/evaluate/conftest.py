"""A tiny model with a tokenizer, and a few questions of every kind of local data."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from deepseek.checkpoint import save_model
from deepseek.evaluate.local_data import COLUMNS
from deepseek.tokenizer import Tokenizer

TEXT = ("The capital of France is Paris. Question: what is 2 + 3? Answer: 5\n\nA. one B. two C. three D. four\n"
        "def add(a, b):\n    return a + b\n = Title = \n 问题：小明有三个苹果。答案：3 \n") * 6


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_config: Callable, random_model: Callable) -> Path:
    tokenizer = Tokenizer.train([TEXT], 400)
    config = tiny_config(vocab_size=400, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id,
                         max_position_embeddings=1536)
    return save_model(random_model(config), tmp_path_factory.mktemp("model") / "tiny", tokenizer=tokenizer)


def write(path: Path, records: Iterable[Any], whole: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([*records]) if whole else "".join(f"{json.dumps(one)}\n" for one in records), "utf-8")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MMLU's anatomy alone, and three questions or more of the other sets."""
    folder = tmp_path_factory.mktemp("eval")
    for split in ("dev", "test"):
        path = folder / "mmlu" / split / f"anatomy_{split}.csv"
        path.parent.mkdir(parents=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(COLUMNS)
            rows.writerows([f"Where is bone {i}, {split}?", "head", "hand,\nleft", '"foot"', "back", i % 4]
                           for i in range(6))
    for split in ("train", "test"):
        write(folder / "gsm8k" / f"{split}.jsonl", (
            {"question": f"What is {i} + 1?", "answer": f"It is <<{i}+1={i + 1}>>.\n#### {i + 1}"} for i in range(6)))
    write(folder / "humaneval" / "HumanEval.jsonl", ({
        "task_id": f"HumanEval/{i}", "prompt": f"def add{i}(a, b):\n", "entry_point": f"add{i}",
        "canonical_solution": "    return a + b\n", "test": "def check(f):\n    assert f(2, 3) == 5\n"}
        for i in range(3)))
    write(folder / "mbpp" / "mbpp.jsonl", ({
        "task_id": i, "text": "Add.", "code": "def add(a, b): return a + b", "test_setup_code": "",
        "test_list": ["assert add(2, 3) == 5", "assert add(1, 1) == 2", "assert add(0, 0) == 0"],
        "challenge_test_list": []} for i in (*range(1, 15), 511, 600, 601, 974)))
    for split in ("valid", "test"):
        path = folder / "wikitext2" / f"wiki.{split}.tokens"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f" \n = Title {i} = \n \n The capital of France is Paris . \n = = Part = = \n \n "
                                "What is 2 ? \n" for i in range(3)), "utf-8")
    for name in ("dev", "test"):
        write(folder / "aqua" / f"{name}.jsonl", ({
            "question": f"What is {i} + 1?", "options": [f"{letter}){n}" for n, letter in enumerate("ABCDE")],
            "rationale": "", "correct": "ABCDE"[(i + 1) % 5]} for i in range(3)))
    write(folder / "cmath" / "cmath_dev.jsonl", ({"input": f"小明有{i}个苹果。", "golden": str(i)} for i in range(3)))
    write(folder / "svamp" / "SVAMP.json", ({
        "ID": f"chal-{i}", "Body": f"Ann has {i} pens", "Question": "How many?", "Answer": float(i)}
        for i in range(3)), whole=True)
    return folder
