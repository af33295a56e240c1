"""The text behind the benchmarks of named experts: which files teach a name, and which source it never sees.

fetch_data.py fetches them. No training file comes from the source in UNSEEN; of MMLU, four subjects of economics and
accounting make one. Where nothing has been fetched, a sample of generated sentences takes their place: it shows that a
benchmark runs, and its figures mean nothing, so they are not written into results/.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
from pathlib import Path

from fetch_data import DATA

TRAIN: dict[str, tuple[str, ...]] = {
    "text_expert": ("text/books_en/text.jsonl", "text/peps_en/text.jsonl", "text/tinyshakespeare/input.txt"),
    "chinese_expert": ("chinese/d2l_zh/text.jsonl", "chinese/pydocs_zh/text.jsonl", "chinese/poetry_zh/text.jsonl"),
    "code_expert": ("code/code_python/text.jsonl", "code/code_other/text.jsonl"),
    "math_expert": ("math/math_tal/ch_train.jsonl", "math/math_tal/en_train.jsonl", "eval/aqua/dev.jsonl",
                    "eval/cmath/cmath_dev.jsonl"),
    "law_expert": ("law/laws_zh/text.jsonl", "law/licences_en/licences.jsonl", "law/licences_en/site_policy.jsonl",
                   "law/books_law_en/text.jsonl"),
    "finance_expert": ("finance/books_finance_en/text.jsonl", "finance/finance_tatqa/dev.jsonl",
                       "finance/finance_tatqa/test_gold.jsonl"),
    "medical_expert": ("medicine/medicine_medquad/qa.jsonl",),
    "dialogue_expert": ("dialogue/dialogue_taskmaster/tm3.jsonl", "dialogue/dialogue_taskmaster/tm4.jsonl",
                        "dialogue/dialogue_zh/crosswoz.jsonl", "dialogue/dialogue_zh/kdconv.jsonl"),
}
UNSEEN: dict[str, tuple[str, tuple[str, ...]]] = {
    "text_expert": ("WikiText-2", ("eval/wikitext2/wiki.test.tokens",)),
    "chinese_expert": ("HowToCook", ("chinese/howtocook_zh/text.jsonl",)),
    "code_expert": ("HumanEval", ("eval/humaneval/HumanEval.jsonl",)),
    "math_expert": ("GSM8K", ("eval/gsm8k/test.jsonl",)),
    "law_expert": ("LawBench", ("law/lawbench/zero_shot",)),
    "finance_expert": ("MMLU economics and accounting", tuple(
        f"eval/mmlu/test/{subject}_test.csv" for subject in (
            "econometrics", "high_school_macroeconomics", "high_school_microeconomics", "professional_accounting"))),
    "medical_expert": ("PubMedQA", ("medicine/medicine_pubmedqa/pqal.jsonl",)),
    "dialogue_expert": ("Schema-Guided Dialogue", ("dialogue/dialogue_sgd/train.jsonl",)),
}
LAW_CASES = "esft/datasets/train/law.jsonl"
MORE = {"math_expert": ("eval/gsm8k/train.jsonl",), "law_expert": (LAW_CASES,)}  # read by law.py and pipeline.py alone
SAMPLE = DATA.with_name("sample")
WORDS = {  # of the sample
    "text_expert": "evening river letter garden window silence journey winter brother stranger harbour candle road",
    "chinese_expert": "天气 山水 春天 朋友 学校 城市 历史 文化 音乐 故事 道路 月光 花园 早晨 茶馆 河流",
    "code_expert": "function return import class index buffer string loop array parser thread module compile pointer",
    "math_expert": "number fraction angle triangle sum product divisor equation ratio speed distance remainder square",
    "law_expert": "court contract liability statute plaintiff damages clause tenant judgement appeal evidence property",
    "finance_expert": "revenue interest market capital dividend balance asset tax inflation profit credit price share",
    "medical_expert": "patient symptom treatment infection blood doctor disease tissue therapy surgery dose diagnosis",
    "dialogue_expert": "hello please order ticket table tonight thanks booking coffee movie confirm seats welcome sure",
}


def add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, help=f"folder that fetch_data.py filled (default: {DATA.name} beside the "
                        "other caches, or, where nothing has been fetched, a generated sample)")


def data_folder(given: Path | None) -> tuple[Path, str]:
    """(folder of the data, "" for fetched data or "-sample"). Exits where a folder lacks a file."""
    data = given or DATA
    if given or data.is_dir():
        for place in sorted({file for table in (TRAIN, MORE) for files in table.values() for file in files}
                            | {file for _, files in UNSEEN.values() for file in files}):
            if not (data / place).exists():
                raise SystemExit(f"{data / place}: no such file; `python benchmarks/fetch_data.py` fetches it")
        return data, ""
    print("No data: `python benchmarks/fetch_data.py` fetches it (`--list`: sources and licences). This run takes a "
          "generated sample: it shows that the benchmark runs; its figures mean nothing.", flush=True)
    if not SAMPLE.is_dir():
        part = SAMPLE.with_name("sample.part")
        shutil.rmtree(part, ignore_errors=True)
        write_sample(part)
        part.rename(SAMPLE)
    return SAMPLE, "-sample"


def write_sample(folder: Path, records: int = 150) -> None:
    """Files of the same names and forms, with random sentences of each domain's words."""
    draw = random.Random(0)

    def text(name: str, sentences: int = 20) -> str:
        words, chinese = WORDS[name].split(), name == "chinese_expert"
        return " ".join(("" if chinese else " ").join(draw.choices(words, k=draw.randint(6, 12))).capitalize()
                        + ("。" if chinese else ".") for _ in range(sentences))

    for name in WORDS:
        for place in (*TRAIN[name], *UNSEEN[name][1], *MORE.get(name, ())):
            path = folder / place if Path(place).suffix else folder / place / "all.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8", newline="") as file:
                if path.suffix == ".csv":
                    rows = csv.writer(file)
                    rows.writerow(["question", *(f"choice{n}" for n in range(4)), "answer"])
                    rows.writerows([text(name), *(text(name, 1) for _ in range(4)), draw.randrange(4)]
                                   for _ in range(records))
                elif path.suffix == ".jsonl":
                    for _ in range(records):
                        one: dict[str, object] = {"text": text(name)}
                        if place == LAW_CASES:
                            one = {"messages": [{"role": "user", "content": text(name)},
                                                {"role": "assistant", "content": text(name, 1)}]}
                        file.write(json.dumps(one, ensure_ascii=False) + "\n")
                else:
                    file.write("\n\n".join(text(name) for _ in range(records)) + "\n")


def places(data: Path, files: tuple[str, ...]) -> list[Path]:
    return [data / file for file in files]
