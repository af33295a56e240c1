"""Questions for seven domains, written for this project (prompts.yaml); the base answers them itself (records.py).

They show gates what a question to an assistant looks like in each domain, and keep the experts near the way in which
the base answers.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path

from deepseek.files import read_yaml

FORMS = read_yaml(Path(__file__).with_suffix(".yaml"))
TEXTS = FORMS.pop("texts")
SUMS = 160  # questions with random numbers


def prompts(name: str, seed: int = 0) -> list[str]:
    """All questions of a name, in an order that the seed decides."""
    draw = random.Random(f"{name}/{seed}")
    topics, forms = FORMS[name].get("topics", ()), FORMS[name]["forms"]
    if name == "math_expert":
        out = [sum_of(draw, topics, form) for _, form in zip(range(SUMS), itertools.cycle(forms), strict=False)]
    elif topics:
        out = [form.format(topic) for topic in topics for form in forms]
    else:
        out = [form.format(n=n) for form in forms for n in (2, 3, 4, 5, 6)]
    out = list(dict.fromkeys(out))
    draw.shuffle(out)
    return out


def texts(name: str) -> list[str]:
    """Requests for a name's texts of further kinds."""
    return [form.format(topic) for kind in TEXTS.get(name, ()) for form in kind["forms"]
            for topic in kind["topics"]]


def sum_of(draw: random.Random, topics: list[str], form: str) -> str:
    """A question with numbers that come out."""
    b, a = draw.randint(2, 9), draw.randint(11, 60)
    numbers = {"a": a, "b": b, "c": draw.randint(2, 9), "d": b * draw.randint(12, 60), "e": 2 * b, "f": 3 * b,
               "g": draw.randint(1, 9)}
    return form.format(draw.choice(topics).format(**numbers), **numbers)
