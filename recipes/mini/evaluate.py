"""Loss and routing accuracy of a model with named experts, by name: held-out records, and sources never trained on.

    python recipes/mini/evaluate.py MODEL --data DATA --records RUN/records [--beside BASE]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from deepseek.atlas import Atlas, RoutingAccuracy
from deepseek.checkpoint import load_model, resolve
from deepseek.data import Document, ReadReport, read_documents
from deepseek.data.shards import Batch
from deepseek.model import CausalLM, RoutingRecord
from deepseek.ops.loss import IGNORE
from deepseek.progress import ProgressBar
from deepseek.tokenizer import Tokenizer
from deepseek.tune.examples import pad
from deepseek.tune.records import RecordSet

SEQ_LEN, TOKENS = 512, 4_000  # of a row at most; of a source
ROW_TOKENS = 4096  # of a batch
GENERAL = ("eval/wikitext2/wiki.test.tokens",)


def mmlu(*subjects: str) -> tuple[str, ...]:
    return tuple(f"eval/mmlu/test/{subject}_test.csv" for subject in subjects)


UNSEEN: dict[str, dict[str, tuple[str, ...]]] = {
    "text_expert": {"WikiText-2": GENERAL},
    "code_expert": {"HumanEval": ("eval/humaneval/HumanEval.jsonl",),
                    "Java, C++, Rust": ("code/code_other/text.jsonl",)},
    "math_expert": {"SVAMP": ("eval/svamp/SVAMP.json",), "AQuA": ("eval/aqua/test.jsonl",),
                    "MMLU mathematics": mmlu("elementary_mathematics", "high_school_mathematics",
                                             "college_mathematics")},
    "law_expert": {"MMLU law": mmlu("professional_law", "international_law", "jurisprudence")},
    "finance_expert": {"MMLU economics": mmlu("econometrics", "high_school_macroeconomics",
                                              "high_school_microeconomics", "professional_accounting")},
    "medical_expert": {"PubMedQA": ("medicine/medicine_pubmedqa/pqal.jsonl",),
                       "MMLU medicine": mmlu("professional_medicine", "clinical_knowledge", "anatomy")},
    "dialogue_expert": {"Schema-Guided Dialogue": ("dialogue/dialogue_sgd/train.jsonl",)},
}


class Found(NamedTuple):
    """Of one source: nats a token over so many, and the share of its tokens whose strongest group is the name's."""

    loss: float
    tokens: int
    accuracy: float | None


def spread(documents: Sequence[Document], tokenizer: Tokenizer, tokens: int) -> list[Batch]:
    """Batches of rows from documents evenly spread over a source, about so many tokens."""
    examples = list(RecordSet.of(documents, tokenizer, max_length=SEQ_LEN, overlong="cut", valid_fraction=0.0).train)
    count = sum(len(example.ids) for example in examples)
    kept = max(1, min(len(examples), tokens * len(examples) // count))
    rows = sorted((examples[i * len(examples) // kept] for i in range(kept)), key=lambda example: len(example.ids))
    return [pad(part) for part in divided(rows)]


def divided(rows: Sequence[Any]) -> Iterator[list[Any]]:
    part: list[Any] = []
    for row in rows:
        if part and len(row.ids) * (len(part) + 1) > ROW_TOKENS:
            yield part
            part = []
        part.append(row)
    yield part


@torch.no_grad()
def measure(model: CausalLM, names: Sequence[str], name: str | None, batches: Sequence[Batch], what: str) -> Found:
    """names: of the routing groups, () for a model without; name: the one that the text is of."""
    total, count = 0.0, 0
    accuracy = RoutingAccuracy(model.config, names, whole_rows=True) if names and name in names else None
    for batch in ProgressBar(batches, desc=what, unit="batch", leave=False):
        routing = RoutingRecord()
        sums = model.row_losses(batch.ids_BT, batch.labels_BT, mask_BT=batch.real_BT, routing=routing)
        total += float(sums.double().sum())
        count += int((batch.labels_BT != IGNORE).sum())
        if accuracy is not None:
            assert name is not None
            expert_BT = torch.full_like(batch.ids_BT, names.index(name))
            if batch.real_BT is not None:
                expert_BT[~batch.real_BT] = -1
            accuracy.add(routing, expert_BT, batch.ids_BT)
    return Found(total / count, count, None if accuracy is None else accuracy.by_name().get(str(name)))


def evaluate(folder: str | Path, data: Path, records: Path, names: Sequence[str] | None = None,
             tokens: int = TOKENS, *, unseen: bool = True) -> dict[str, dict[str, Any]]:
    """held_out: by name; unseen: by name and source, if asked for; general: WikiText-2. names: of the records, if the
    model has no atlas."""
    path = resolve(folder)
    model, tokenizer = load_model(path), Tokenizer.load(path)
    groups: tuple[str, ...] = Atlas.load(path).names if model.config.moe_layers else ()
    out: dict[str, dict[str, Any]] = {"held_out": {}, "unseen": {}, "general": {}}

    def found(files: Sequence[Path], name: str | None, what: str) -> dict[str, Any]:
        batches = spread(list(read_documents(list(files), ReadReport())), tokenizer, tokens)
        return measure(model, groups, name, batches, what)._asdict()

    for name in names or groups:
        out["held_out"][name] = found([records / "held_out" / f"{name}.jsonl"], name, name)
        out["unseen"][name] = {source: found([data / file for file in files], name, source)
                               for source, files in UNSEEN[name].items() if unseen}
    out["general"] = found([data / file for file in GENERAL], None, "WikiText-2")
    return out


def table(found: Mapping[str, Any], base: Mapping[str, Any] | None) -> str:
    """Perplexities beside the base's, and routing accuracy."""
    lines = [f"{'':32} {'tokens':>7}  {'base':>8}  {'model':>8}  {'change':>7}  routing"]

    def line(what: str, one: Mapping[str, Any], other: Mapping[str, Any] | None) -> str:
        before = math.nan if other is None else math.exp(other["loss"])
        here, right = math.exp(one["loss"]), one["accuracy"]
        return (f"{what:32} {one['tokens']:>7,}  {before:8.3f}  {here:8.3f}  {here / before - 1:>+7.1%}  "
                + ("" if right is None else f"{right:.1%}"))

    for name, one in found["held_out"].items():
        lines.append(line(name, one, base and base["held_out"].get(name)))
        lines += [line(f"  unseen: {source}", own, base and base["unseen"].get(name, {}).get(source))
                  for source, own in found["unseen"][name].items()]
    lines.append(line("WikiText-2 (general text)", found["general"], base and base["general"]))
    right = [one["accuracy"] for one in found["held_out"].values() if one["accuracy"] is not None]
    if right:
        beyond = [sum(own["accuracy"] for own in sources.values()) / len(sources)
                  for sources in found["unseen"].values() if sources]
        lines.append(f"routing accuracy, mean over names: held out {sum(right) / len(right):.1%}"
                     + (f", unseen sources {sum(beyond) / len(beyond):.1%}" if beyond else ""))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--data", type=Path, required=True, help="folder of the sources")
    parser.add_argument("--records", type=Path, required=True, help="folder that records.py wrote")
    parser.add_argument("--beside", metavar="BASE", help="a model to compare with")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"of a source (default: {TOKENS})")
    args = parser.parse_args()
    found = evaluate(args.model, args.data, args.records, tokens=args.tokens)
    base = args.beside and evaluate(args.beside, args.data, args.records, list(found["held_out"]), args.tokens)
    print(table(found, base))


if __name__ == "__main__":
    main()
