"""Records to tune on, text that must not be forgotten, and the names of the tiny model's groups."""

from __future__ import annotations

from typing import Any

NAMES = ("text_expert", "code_expert", "math_expert", "law_expert")


def records(count: int = 40) -> list[dict[str, Any]]:
    return [{"input": f"What does section {i} of the act say?", "output": f"Section {i} says: pay {i % 7} coins.",
             "metadata": {"complexity": "初级"}} for i in range(count)]


def general() -> list[dict[str, str]]:
    return [{"text": f"The river ran past house number {i}, and nobody counted its windows."} for i in range(12)]
