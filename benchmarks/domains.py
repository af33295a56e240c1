"""The real text behind the benchmarks of named experts: which files teach a name, and which source it never sees.

Everything lies in the folder that --data names (../shared/data); its README has licences and origins. No training file
comes from the source in UNSEEN; of MMLU, four subjects of economics and accounting make one.
"""

from __future__ import annotations

from pathlib import Path

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


def places(data: Path, files: tuple[str, ...]) -> list[Path]:
    return [data / file for file in files]
