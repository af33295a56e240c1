"""Words that were replaced by the field's own stay out: of names, comments and docstrings in src/ and csrc/."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator

import pytest

from tests.helpers import ROOT

# a pattern is searched in each name, comment and docstring, where it must stand at the beginning and end of a word:
# NAMES in names alone, where English keeps the word
RETIRED = {
    r"\w*(?i:quanti)s(?:e|ed|es|er|ers|ing|ation(?!\.json))\w*": "quantize, quantized, quantization",
    "foretold": "prefetched",
    r"side.paths?": "LoRA adapter",
    "verbs?": "command",
}
NAMES: dict[str, str] = {
    # engine
    "announce": "prefetch", "Residents": "ResidencyStats", "Speculated": "DraftStats", "StopText": "StopStringMatcher",
    "PageTable": "BlockTable", "Signatures": "ExpertAffinity", "Coupling": "Ensemble", "_step_back": "preempt",
    "_secure": "_allocate_or_preempt", "there_LE": "resident_LE",
    # serve, watch
    "AnswerText": "OutputParser",
    "shut": "shutdown", "LOOK": "POLL_SECONDS", "Reading": "Snapshot", "growth": "total_delta", "Ran": "StepItem",
    # data, atlas, tune
    "run_step": "run_stage", "in_order": "ordered_map", "Shaped": "ParsedRecord", "answer_at": "response_start",
    "Refusal": "RejectedGroup", "claims": "expert_owners", "Workpiece": "TunedModel", "Tuning": "TuneTrainer",
    "take_round": "next_round", "learnt_tokens": "loss_tokens", "_check_there": "validate_experts",
    # model, quant, ops, checkpoint
    "Visible": "AttentionMask", "Pack": "PackedBatch", "Side": "LoraSpec", "FRIENDLY": "TARGET_ALIASES",
    "PARTS_APART": "UNMERGED", "Recipe": "QuantConfig", "disk_parts": "hf_names", "order_of": "attn_impl",
    "side_paths": "lora_modules", "entrance": "input", "widen": "to_compute_dtype", "trains": "trains_native",
}
ALLOWED = {  # old names that are answered
    *(f"quantised_{what}" for what in ("linear", "mlp", "experts", "places")), "grouped_quantised_linear",
    "learnt_tokens",
}


def words(source: str) -> Iterator[tuple[int, str, bool]]:
    """(line, text, whether it is a name) of every name, comment and docstring."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.NAME, tokenize.COMMENT):
            yield token.start[0], token.string, token.type == tokenize.NAME
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False) or ""
            yield from ((node.body[0].lineno + i, line, False) for i, line in enumerate(text.split("\n")) if line)


def retired(text: str, name: bool) -> Iterator[str]:
    for pattern, instead in (RETIRED | NAMES if name else RETIRED).items():
        for found in re.finditer(rf"(?<!\w)(?:{pattern})(?!\w)", text):
            if found[0] not in ALLOWED:
                yield f"`{found[0]}`: say {instead}"


@pytest.mark.parametrize("folder", ["src", "csrc"])
def test_retired_words_stay_out(folder: str) -> None:
    wrong = []
    for path in sorted((ROOT / folder).rglob("*")):
        if path.suffix == ".py":
            read = words(path.read_text(encoding="utf-8"))
        elif path.suffix in (".h", ".cpp"):
            read = ((i, line, False) for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1))
        else:
            continue
        wrong += [f"{path.relative_to(ROOT)}:{i}: {fault}" for i, text, name in read for fault in retired(text, name)]
    assert not wrong, f"{len(wrong)} retired words:\n" + "\n".join(wrong)


@pytest.mark.parametrize("source", [
    "def dequantise(): pass", "x.QuantisedLinear", "# the quantisation", 'def f():\n    """Says\n\n    quantising"""',
    "class Visible: pass", "# a side path",
])
def test_the_check_can_fail(source: str) -> None:
    (fault,) = [fault for _, text, name in words(source) for fault in retired(text, name)]
    assert re.fullmatch("`.+`: say .+", fault)


def test_the_check_lets_others_pass() -> None:
    source = '"""quantized, quantiles"""\nquantize = "quantise"  # quantisation.json; beside, trains'
    assert not [fault for _, text, name in words(source) for fault in retired(text, name)]
