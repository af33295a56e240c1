"""Words that were replaced by the field's own stay out: of names, comments, docstrings, help, messages and the docs."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache

import pytest

from tests.helpers import ROOT

# a pattern is searched in each name, comment and text, where it must stand at the beginning and end of a word; NAMES in
# names of src/ alone, where English keeps the word
RETIRED = {
    r"\w*(?i:quanti)s(?:e|ed|es|er|ers|ing|ation(?!\.json))\w*": "quantize, quantized, quantization",
    "foretold": "prefetched",
    r"\w*(?i:optimis)(?:e|ed|es|er|ers|ing|ation)\w*": "optimize, optimizer",
    r"(?i:side).paths?": "LoRA adapter",
    "(?i:verbs?)": "command",
    "(?i:whoever)": "who, or a noun", "(?i:somebody)": "a user, a client", "(?:is|are) told": "gets, receives",
    "in the place of": "in place of",
}
NAMES: dict[str, str] = {
    # engine
    "announce": "prefetch", "Residents": "ResidencyStats", "Speculated": "DraftStats", "StopText": "StopStringMatcher",
    "PageTable": "BlockTable", "Signatures": "ExpertAffinity", "Coupling": "Ensemble", "_step_back": "preempt",
    "_secure": "_allocate_or_preempt", "there_LE": "resident_LE", "followed": "num_drafted_tokens",
    "coupling": "ensemble", "filed": "prefix_key", "holders": "ref_count", "Work": "ScheduledRequest",
    "step_tokens": "max_num_batched_tokens", "coming": "in_flight", "Gain": "AdaptiveDrafting", "_Choice": "Trial",
    # serve, watch
    "AnswerText": "OutputParser", "Nothing": "Unsupported", "told": "stats, reported, on_refused",
    "shut": "shutdown", "LOOK": "POLL_SECONDS", "Reading": "Snapshot", "growth": "total_delta", "Ran": "StepItem",
    # data, atlas, tune
    "run_step": "run_stage", "in_order": "ordered_map", "Shaped": "ParsedRecord", "answer_at": "response_start",
    "Refusal": "RejectedGroup", "claims": "expert_owners", "Workpiece": "TunedModel", "Tuning": "TuneTrainer",
    "take_round": "next_round", "learnt_tokens": "loss_tokens", "_check_there": "validate_experts",
    "Done": "StageResult", "job": "plan", "fresh": "iter_new", "verbs?": "commands",
    # model, quant, ops, checkpoint
    "Visible": "AttentionMask", "Pack": "PackedBatch", "Side": "LoraSpec", "FRIENDLY": "TARGET_ALIASES",
    "PARTS_APART": "UNMERGED", "Recipe": "QuantConfig", "disk_parts": "hf_names", "order_of": "attn_impl",
    "side_paths": "lora_modules", "entrance": "input", "widen": "to_compute_dtype", "trains": "trains_native",
    "parted": "split_route", "_through": "_checkpointed", "operation": "register_op", "SURE": "MIN_CONFIDENCE",
}
ALLOWED = {  # old names that are answered
    *(f"quantised_{what}" for what in ("linear", "mlp", "experts", "places")), "grouped_quantised_linear",
    "learnt_tokens",
}


def words(source: str) -> Iterator[tuple[int, str, bool]]:
    """(line, text, whether it is a name) of every name, comment and text."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.NAME, tokenize.COMMENT):
            yield token.start[0], token.string, token.type == tokenize.NAME
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from ((node.lineno + i, line, False) for i, line in enumerate(node.value.split("\n")) if line)


def any_of(patterns: dict[str, str]) -> tuple[re.Pattern[str], list[str]]:
    """One pattern with a group for each, and what to say instead of what the group finds."""
    return re.compile(rf"(?<!\w)(?:{'|'.join(f'({p})' for p in patterns)})(?!\w)"), [*patterns.values()]


ANY, ANY_NAME = any_of(RETIRED), any_of(RETIRED | NAMES)


@cache  # a name stands in many lines
def retired(text: str, name: bool) -> list[str]:
    pattern, instead = ANY_NAME if name else ANY
    return [f"`{found[0]}`: say {instead[found.lastindex - 1]}" for found in pattern.finditer(text)
            if found[0] not in ALLOWED]


@pytest.mark.parametrize("place", "src/**/* csrc/* docs/**/* examples/* benchmarks/* .github/**/* *".split())
def test_retired_words_stay_out(place: str) -> None:
    wrong, count = [], 0
    for path in sorted(ROOT.glob(place)):
        if path.name != "Makefile" and path.suffix not in (".py", ".h", ".cpp", ".md", ".html", ".toml", ".yml"):
            continue
        source, count = path.read_text(encoding="utf-8"), count + 1
        found = words(source) if path.suffix == ".py" else (
            (i, line, False) for i, line in enumerate(source.splitlines(), 1))
        wrong += [f"{path.relative_to(ROOT)}:{i}: {fault}" for i, text, name in found
                  for fault in retired(text, name and place.startswith("src"))]
    assert count and not wrong, "\n".join(wrong)


@pytest.mark.parametrize("source", [
    "def dequantise(): pass", "x.QuantisedLinear", "# the quantisation", 'def f():\n    """Says\n\n    quantising"""',
    "class Visible: pass", "# a side path", "# Whoever asks", "# it is told",
    'help="the verb"', 'raise ValueError(f"{x}: of the optimiser")',
])
def test_the_check_can_fail(source: str) -> None:
    (fault,) = [fault for _, text, name in words(source) for fault in retired(text, name)]
    assert re.fullmatch("`.+`: say .+", fault)


def test_the_check_lets_others_pass() -> None:
    source = '"""quantized, quantiles"""\nquantize = "a quantile"  # quantisation.json; beside, trains'
    assert not [fault for _, text, name in words(source) for fault in retired(text, name)]
