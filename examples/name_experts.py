"""Measure which experts serve which text, and keep the names that held-out text confirms.

python examples/name_experts.py MODEL law_expert=laws.jsonl code_expert=src/
"""

from __future__ import annotations

import sys

from deepseek import Tokenizer, load_model
from deepseek.atlas import profile
from deepseek.data import ReadReport, read_documents


def main(model: str, *sources: str) -> None:
    texts = {name: read_documents([path], ReadReport()) for name, path in (source.split("=", 1) for source in sources)}
    atlas = profile(load_model(model), Tokenizer.load(model), texts, tokens=1 << 14)
    atlas.save(model)  # atlas.json beside the weights: tuning, warm-up and the server know the names from here on
    for group in atlas.groups:
        own, other, p = (group.evidence[key] for key in ("coverage_slots", "coverage_slots_others", "p_adjusted"))
        print(f"{group.name}: {len(group.experts)} experts, {own:.0%} of its own text, {other:.0%} of other; p {p:.4f}")
    for refused in atlas.refused:
        print(f"{refused.name} is refused: {refused.reason}")


if __name__ == "__main__":
    main(*sys.argv[1:])
