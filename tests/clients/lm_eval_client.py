"""lm-evaluation-harness: local-completions on tasks of a local file."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import lm_eval
from lm_eval.tasks import TaskManager

from tests.helpers.client_cases import KEY, MODEL, URL, Cases

case = Cases("lm-eval local-completions")
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
"""
CHOICES = 'doc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\nmetric_list: [{metric: acc}]\n'
UNTIL = ('doc_to_target: "{{question}}"\ngeneration_kwargs: {until: ["\\n"], max_gen_toks: 8}\n'
         'metric_list: [{metric: exact_match}]\n')
ROLLING = 'doc_to_target: "{{question}}"\nmetric_list: [{metric: word_perplexity}]\n'


def evaluate(kind: str, more: str, concurrent: int = 1) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.jsonl"
        data.write_text("".join(json.dumps({
            "question": f"the quick brown fox {i}", "choices": ["jumps", "over", "the lazy dog"], "answer": i % 3})
            + "\n" for i in range(6)), encoding="utf-8")
        (Path(folder) / "task.yaml").write_text(TASK.format(name=f"own_{kind}", data=data, kind=kind) + more)
        done = lm_eval.simple_evaluate(
            "local-completions", model_args={
                "model": MODEL, "base_url": f"{URL}/completions", "tokenizer": os.environ["MODEL_FOLDER"],
                "num_concurrent": concurrent, "max_length": 512, "max_retries": 1},
            tasks=[f"own_{kind}"], task_manager=TaskManager(include_path=folder, include_defaults=False),
            bootstrap_iters=0, batch_size=2)
        return done["results"][f"own_{kind}"]


@case("multiple choice (log-likelihoods)")
def _() -> None:
    os.environ["OPENAI_API_KEY"] = KEY
    assert 0 <= evaluate("multiple_choice", CHOICES)["acc,none"] <= 1


@case("the same, four at once")
def _() -> None:
    assert evaluate("multiple_choice", CHOICES, 4) == evaluate("multiple_choice", CHOICES)


@case("generate_until")
def _() -> None:
    assert "exact_match,none" in evaluate("generate_until", UNTIL)


@case("rolling log-likelihoods")
def _() -> None:
    assert evaluate("loglikelihood_rolling", ROLLING)["word_perplexity,none"] > 1


if __name__ == "__main__":
    case.run()
