"""Named cases of one client: each prints a line of JSON, {"client", "case", "error"}; an error of null has passed."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from typing import Any

URL, KEY, MODEL = os.environ["OPENAI_BASE_URL"], os.environ["OPENAI_API_KEY"], os.environ["MODEL"]
HELLO: list[Any] = [{"role": "user", "content": "the quick brown"}]
PARAMETERS: dict[str, Any] = {
    "type": "object", "properties": {"city": {"type": "string", "enum": ["Paris", "Oslo"]}, "days": {"enum": [1, 2]}},
    "required": ["city", "days"], "additionalProperties": False}
WEATHER: dict[str, Any] = {"type": "function", "function": {
    "name": "weather", "description": "The weather of a city.", "parameters": PARAMETERS}}


class Cases:
    """Collects the cases of a client and runs them in order."""

    def __init__(self, client: str) -> None:
        self.client, self._cases = client, list[tuple[str, Callable[[], Any]]]()

    def __call__(self, name: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
        def add(case: Callable[[], Any]) -> Callable[[], Any]:
            self._cases.append((name, case))
            return case

        return add

    def run(self) -> None:
        for name, case in self._cases:
            error = None
            try:
                case()
            except Exception as failure:
                place = traceback.extract_tb(failure.__traceback__)
                own = next((frame for frame in reversed(place) if frame.filename.endswith("_client.py")), place[-1])
                error = f"line {own.lineno}: {type(failure).__name__}: {str(failure) or own.line}"
            print(json.dumps({"client": self.client, "case": name, "error": error}), flush=True)
