"""Output that must match a JSON schema, a regular expression or a grammar."""

from __future__ import annotations

from torch import Tensor

from ..errors import RequestError
from ..tokenizer import Tokenizer
from .sampler import SamplingParams


class Constraint:
    finished = False

    def allow(self, logits_V: Tensor) -> Tensor:
        raise NotImplementedError

    def accept(self, token: int) -> None:
        raise NotImplementedError


class Constraints:
    def __init__(self, tokenizer: Tokenizer | None, vocabulary: int, eos_ids: frozenset[int]) -> None:
        self.tokenizer = tokenizer

    def of(self, params: SamplingParams) -> Constraint | None:
        if params.json_schema is None and params.regex is None and params.grammar is None:
            return None
        raise RequestError("constrained output is not built yet")
