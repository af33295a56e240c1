"""Token ids -> text, piece by piece, up to the first stop string."""

from __future__ import annotations

from collections.abc import Sequence

from ..tokenizer import Tokenizer
from .sampling_params import SamplingParams


class StopStringMatcher:
    """Text that arrives in pieces and ends before the first stop string.

    What could be the beginning of a stop string is held back until more is known, so that no part of one gets out. Of
    several stop strings the one that is complete first counts, however the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.stopped = False
        self.held = ""

    def push(self, piece: str) -> str:
        """Take a piece in; returns the text that is now certain."""
        if self.stopped or not piece:
            return ""
        held = self.held + piece
        found = [(start + len(stop), start) for stop in self.stops if (start := held.find(stop)) >= 0]
        if found:
            self.stopped, self.held = True, ""
            return held[: min(found)[1]]
        keep = next((n for n in range(len(held), 0, -1) if any(stop.startswith(held[-n:]) for stop in self.stops)), 0)
        self.held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """The text is over: what was held back was no stop string after all."""
        held, self.held = self.held, ""
        return held


class TextStream:
    """The text of a request so far, `text`. Without a tokenizer it stays empty."""

    def __init__(self, tokenizer: Tokenizer | None, params: SamplingParams) -> None:
        self.text = ""
        self._detokenizer = None if tokenizer is None else tokenizer.stream(skip_special=params.skip_special_tokens)
        self._matcher = StopStringMatcher(params.stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete."""
        return self._matcher.stopped

    @property
    def length(self) -> int:
        """Characters so far, those held back included."""
        return len(self.text) + len(self._matcher.held)

    def push(self, token: int, *, match: bool) -> str:
        """Extend the text; returns the token's own piece. match: whether a stop string may end the text."""
        piece = "" if self._detokenizer is None else self._detokenizer.push(token)
        self.text += self._matcher.push(piece) if match else piece
        return piece

    def flush(self) -> None:
        """No token follows: add what was held back."""
        if self._detokenizer is not None:
            self.text += self._matcher.push(self._detokenizer.flush())
            self.text += self._matcher.flush()
