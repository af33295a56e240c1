"""Local files -> the records that the harness' tasks expect of the hub's data sets.

    mmlu/{dev,test}/SUBJECT_{dev,test}.csv   question,choice0,...,choice3,answer with this header; answers are indices
    gsm8k/{train,test}.jsonl                 {question, answer}
    humaneval/HumanEval.jsonl                {task_id, prompt, entry_point, canonical_solution, test}
    mbpp/mbpp.jsonl                          {task_id, text, code, test_list, ...}; ids 1-10 are prompts, 11-510 test,
                                             511-600 validation, 601-974 train
    wikitext2/wiki.{valid,test}.tokens       text, cut into articles at headings of the first level
    aqua/{dev,test}.jsonl                    {question, options: ["A)...", ...], correct: "A"}
    cmath/cmath_dev.jsonl                    {input, golden}
    svamp/SVAMP.json                         a list of {Body, Question, Answer}
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import parse_json, read_text, reading

Records = list[dict[str, Any]]
Splits = dict[str, Records]
COLUMNS = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]
MBPP_SPLITS = {"prompt": (1, 10), "test": (11, 510), "validation": (511, 600), "train": (601, 974)}
LETTERS = "ABCDE"


def read_splits(folder: Path, dataset: str, name: str | None) -> Splits:
    """Split -> records of a data set of READERS. name: of the part, MMLU's subject.

    Raises NotFoundError or DataError, naming the file and the line.
    """
    splits = READERS[dataset](folder, name or "")
    for split, records in splits.items():
        if not records:
            raise DataError(f"{folder}: {dataset}: the split {split} has no records")
    return splits


def _mmlu(folder: Path, subject: str) -> Splits:
    return {split: _mmlu_records(folder / "mmlu" / split / f"{subject}_{split}.csv", subject)
            for split in ("dev", "test")}


def _mmlu_records(path: Path, subject: str) -> Records:
    rows = csv.DictReader(io.StringIO(read_text(path), newline=""))
    if rows.fieldnames != COLUMNS:
        raise DataError(f"{path}: the first line must be {','.join(COLUMNS)}")
    records: Records = []
    with reading(path, DataError):
        for row in rows:
            if None in row or None in row.values() or row["answer"] not in {"0", "1", "2", "3"}:
                raise ValueError(f"line {rows.line_num}: must have six fields, the last an index from 0 to 3")
            records.append({"question": row["question"], "subject": subject, "answer": int(row["answer"]),
                            "choices": [row[f"choice{i}"] for i in range(4)]})
    return records


def _gsm8k(folder: Path, _: str) -> Splits:
    return {split: _lines(folder / "gsm8k" / f"{split}.jsonl", question=str, answer=str) for split in ("train", "test")}


def _humaneval(folder: Path, _: str) -> Splits:
    return {"test": _lines(folder / "humaneval" / "HumanEval.jsonl", task_id=str, prompt=str, entry_point=str,
                           canonical_solution=str, test=str)}


def _mbpp(folder: Path, _: str) -> Splits:
    path = folder / "mbpp" / "mbpp.jsonl"
    records = _lines(path, task_id=int, text=str, code=str, test_list=list)
    if short := [record["task_id"] for record in records if len(record["test_list"]) < 3]:
        raise DataError(f"{path}: task_id {short[0]}: test_list must have three tests")
    return {split: [record for record in records if first <= record["task_id"] <= last]
            for split, (first, last) in MBPP_SPLITS.items()}


def _wikitext(folder: Path, _: str) -> Splits:
    texts = {"validation": "valid", "test": "test"}
    splits = {split: _articles(read_text(folder / "wikitext2" / f"wiki.{name}.tokens"))
              for split, name in texts.items()}
    return {"train": splits["validation"][:1], **splits}  # the task names the split and does not read it


def _articles(text: str) -> Records:
    """As EleutherAI's wikitext_document_level cuts it."""
    pages, page = [], list[str]()
    for line in text.split("\n"):
        plain = line.replace("= = =", "===").replace("= =", "==").strip()
        if plain.startswith("= ") and plain.endswith(" ="):
            pages.append("\n".join(page))
            page = []
        page.append(line)
    return [{"page": text} for text in [*pages, "\n".join(page)] if text.strip()]


def _aqua(folder: Path, _: str) -> Splits:
    splits = {split: _lines(folder / "aqua" / f"{name}.jsonl", question=str, options=list, correct=str)
              for split, name in (("validation", "dev"), ("test", "test"))}
    for split, records in splits.items():
        for record in records:
            if len(record["options"]) != 5 or record["correct"] not in [*LETTERS]:
                raise DataError(f"{folder / 'aqua'}: {split}: {record['question']!r:.60}: must have five options and "
                                "correct, a letter from A to E")
            record["choices"] = [str(option).partition(")")[2].strip() for option in record["options"]]
            record["answer"] = LETTERS.index(record["correct"])
    return splits


def _cmath(folder: Path, _: str) -> Splits:
    return {"test": _lines(folder / "cmath" / "cmath_dev.jsonl", input=str, golden=str)}


def _svamp(folder: Path, _: str) -> Splits:
    path = folder / "svamp" / "SVAMP.json"
    text = read_text(path)
    with reading(path, DataError):
        records = json.loads(text)
        if not isinstance(records, list):
            raise ValueError("must be a list")
        return {"test": [_checked(record, f"record {n}", {"Body": str, "Question": str, "Answer": float | int})
                         for n, record in enumerate(records)]}


READERS: dict[str, Callable[[Path, str], Splits]] = {  # by the hub's name of the data set
    "cais/mmlu": _mmlu, "openai/gsm8k": _gsm8k, "openai/openai_humaneval": _humaneval,
    "google-research-datasets/mbpp": _mbpp, "EleutherAI/wikitext_document_level": _wikitext,
    "aqua": _aqua, "cmath": _cmath, "svamp": _svamp}


def _lines(path: Path, **kinds: Any) -> Records:
    """The objects of a JSON Lines file, which have these keys."""
    text = read_text(path)
    with reading(path, DataError):
        return [_checked(_parsed(line, n), f"line {n}", kinds) for n, line in enumerate(text.split("\n"), 1)
                if line.strip()]


def _parsed(line: str, n: int) -> dict[str, Any]:
    try:
        return parse_json(line)
    except ValueError as error:
        raise ValueError(f"line {n}: {error}") from None


def _checked(record: Any, where: str, kinds: Mapping[str, Any]) -> dict[str, Any]:
    for key, kind in kinds.items():
        if not isinstance(record, dict) or not isinstance(record.get(key), kind):
            name = getattr(kind, "__name__", "number")
            raise ValueError(f"{where}: {key}: must be a {'text' if kind is str else name}")
    return record
