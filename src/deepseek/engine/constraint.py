"""Output that must match a JSON schema, a regular expression or a grammar.

Before each token llguidance says which tokens may come next: those after which the text can still become one that
matches. All others get the logit -inf, so whatever is sampled fits; the text may end only where it matches.

The library sees the tokenizer's tokens as the bytes they are in a text. Control tokens and ids beyond the tokenizer's
are none and never come: text that spells `<|User|>` is allowed where it matches, the token is not. The library's own
end of sequence is one id past the vocabulary; it stands for whichever ids end a text, for none under `ignore_eos`.

Where nothing can follow, the text is finished without an end-of-sequence token; so it is where the only way on is a
byte that no token has. A grammar that outgrows the library's limits ends its request with an error.

Grammars come from clients, and are compiled within limits (grammars.py). Masks are computed on threads of their own:
the library releases the interpreter's lock, so the masks of a batch are computed side by side, and a request whose mask
takes long misses steps without holding up the others (engine.py). Constraints that were late once share one thread of
low priority, so that fast masks do not wait behind slow ones.

Shape letters: V vocabulary.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cached_property, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import RequestError
from ..grammars import compile_grammar
from ..tokenizer import BYTES, Tokenizer
from .sampling_params import SamplingParams

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

GRAMMARS, LARGE = 32, 4  # compiled ones that are kept; of those with more than SMALL bytes, which may hold 100 MB
SMALL = 2 << 10
LATE = 0.005  # seconds after which a mask is computed with low priority from then on
NICENESS = 10  # of that thread: about a tenth of a busy core
_PUNCTUAL, _LATE = ThreadPoolExecutor(2, "masks"), ThreadPoolExecutor(1, "late-masks")


@lru_cache(1)
def _executor() -> LLExecutor:
    """One thread of the library's own with low priority, which it has from the thread that makes it.

    It never holds the interpreter's lock: a thread of low priority that did would hold up everybody (docs/log.md).
    """
    from llguidance import LLExecutor

    def make() -> LLExecutor:
        if hasattr(os, "setpriority"):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        return LLExecutor(1)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(make).result()


class Constraint:
    """What one text may go on with.

    `accept` starts the computation of the next mask. Reading it waits for it; `settle` waits as long as is wanted.
    """

    def __init__(self, matcher: LLMatcher, second: LLMatcher, text_V: np.ndarray, eos_ids: frozenset[int]) -> None:
        """matcher: used here only. second: any other of the same tokenizer, without which the library's executor
        computes on the caller's thread. text_V: True for tokens that are text. eos_ids: end it."""
        self._matcher, self._second, self._text_V, self._eos = matcher, second, text_V, sorted(eos_ids)
        self._future: Future[tuple[bool, np.ndarray]] | None = None
        self.late = False  # once: its masks take long
        mask = self._mask()
        self._end = len(mask) - 1  # the library's end of sequence
        self.read(True, mask)
        self._finished = False

    def _mask(self) -> np.ndarray:
        return np.frombuffer(self._matcher.compute_logit_bias(), dtype=bool)

    def read(self, consumed: bool, mask: np.ndarray) -> None:
        """Take in what may come next. Raises RequestError where the library gave up."""
        if self._matcher.is_error() and not (why := self._matcher.get_error()).startswith("NoExtension"):  # no token
            raise RequestError(f"the constraint outgrew its limits: {' '.join(why.split()):.200}")
        allowed_V = mask[: len(self._text_V)] & self._text_V
        self._finished = not (consumed and allowed_V.any())
        allowed_V[self._eos] = bool(mask[-1]) and not self._matcher.is_error()
        self._allowed_V = torch.from_numpy(allowed_V)

    def advance(self, token: int) -> tuple[bool, np.ndarray]:
        if self.late:
            return self._advance_late(token)
        start = time.thread_time()
        consumed, mask = self._matcher.consume_token(token), self._mask()
        self.late = time.thread_time() - start > LATE
        return consumed, mask

    def _advance_late(self, token: int) -> tuple[bool, np.ndarray]:
        from llguidance.numpy import fill_next_token_bitmask_par

        consumed, _ = _executor().consume_token_par([(self._matcher, token), (self._second.deep_copy(), token)])
        if self._matcher.is_error():
            return False, self._mask()
        end = self._end
        bits_2W = np.zeros((2, -(-(end + 1) // 32)), np.int32)
        fill_next_token_bitmask_par(_executor(), [(self._matcher, 0), (self._second.deep_copy(), 1)], bits_2W)
        return consumed, np.unpackbits(bits_2W[0].view(np.uint8), bitorder="little")[: end + 1].astype(bool)

    @property
    def pending(self) -> bool:
        """Whether the mask after the last token is not known yet."""
        return self._future is not None

    def settle(self, seconds: float | None = None) -> bool:
        """Wait for the mask, for ever or `seconds` at most; whether it is known.

        Raises RequestError where the grammar outgrew its limits.
        """
        if self._future is not None and wait((self._future,), seconds).done:
            future, self._future = self._future, None
            self.read(*future.result())
        return self._future is None

    @property
    def allowed_V(self) -> Tensor:  # noqa: N802
        """True for every token that may come next."""
        self.settle()
        return self._allowed_V

    @property
    def finished(self) -> bool:
        """Whether nothing can follow what was accepted."""
        self.settle()
        return self._finished

    def allow(self, logits_V: Tensor) -> Tensor:
        """The logits with -inf for every token that may not come next."""
        return logits_V.masked_fill(~self.allowed_V.to(logits_V.device), -torch.inf)

    def accept(self, token: int) -> None:
        """Append `token`, one of the allowed, to the text."""
        self.settle()
        self._future = (_LATE if self.late else _PUNCTUAL).submit(self.advance, token)


class Constraints:
    """Makes the constraints of an LLM's requests. The first one loads the library; a grammar is compiled once.

    vocabulary: of the model, which may have more than the tokenizer's.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocabulary: int, eos_ids: frozenset[int]) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._eos_ids = frozenset(i for i in eos_ids if i < vocabulary)
        self.compiled, self._large = lru_cache(GRAMMARS)(self._compile), lru_cache(LARGE)(self._compile)

    def of(self, params: SamplingParams) -> Constraint | None:
        """The constraint of one request, None if it asks for none.

        Raises RequestError for a schema, regular expression or grammar that is invalid, that asks for what the library
        does not know, or that nothing matches; without a tokenizer; and without the library.
        """
        given = [(field, value) for field in ("json_schema", "regex", "grammar")
                 if (value := getattr(params, field)) is not None]
        if not given:
            return None
        [(field, value)] = given  # SamplingParams sees to it that there is one
        text_V = self._tokens[1]
        try:
            source = _schema(value) if field == "json_schema" else value
            compiled = self.compiled if len(source) <= SMALL else self._large
            matcher = compiled(field, source).deep_copy()
        except (TypeError, ValueError, RecursionError) as error:  # what json and the library raise for bad input
            raise RequestError(f"{field} = {value!r:.80}: {' '.join(str(error).split()):.400}") from None
        constraint = Constraint(matcher, self._any, text_V, frozenset() if params.ignore_eos else self._eos_ids)
        if not constraint.allowed_V.any():
            raise RequestError(f"{field} = {value!r:.80}: no token can begin a text that matches")
        return constraint

    def _compile(self, field: str, source: str) -> LLMatcher:
        return compile_grammar(self._tokens[0], field, source)

    def load(self) -> None:
        """Load the library and its tables now, a second with a large vocabulary, and not with the first request.

        Raises RequestError where there can be no constraints.
        """
        self._any  # noqa: B018

    @cached_property
    def _any(self) -> LLMatcher:
        return self._compile("regex", "a")

    @cached_property
    def _tokens(self) -> tuple[LLTokenizer, np.ndarray]:
        """The library's view of the tokenizer, and a boolean [V]: True for tokens that are text."""
        if self._tokenizer is None:
            raise RequestError("constrained output needs a tokenizer, and this model was given without one")
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError:
            raise RequestError("constrained output needs the package llguidance (pip install 'moe-dr[llguidance]')"
                               ) from None
        tokens = _Tokens(self._tokenizer, self._vocabulary, self._eos_ids)
        return LLTokenizer(TokenizerWrapper(tokens)), np.array(list(map(bool, tokens.tokens[: self._vocabulary])))


class _Tokens:
    """A tokenizer with the attributes that the library asks for. Its text is never read as control tokens."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, eos_ids: frozenset[int]) -> None:
        with TemporaryDirectory() as folder:
            tokenizer.save(folder)
            definition = json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))
        if "ByteLevel" not in json.dumps(definition.get("decoder")):
            raise RequestError("constrained output needs a byte-level tokenizer, and this model's is another kind")
        end = max(vocabulary, tokenizer.vocab_size)
        self.tokens = [b""] * end + [b"<end>"]
        self.eos_token_id, self.bos_token_id, self.special_token_ids = end, None, [end]
        left_out = eos_ids.union(token["id"] for token in definition.get("added_tokens") or [])
        for text, i in definition["model"]["vocab"].items():
            if i not in left_out and BYTES.keys() >= set(text):
                self.tokens[i] = bytes(BYTES[character] for character in text)
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


def _schema(value: str | Mapping[str, Any]) -> str:
    """As JSON text. Raises TypeError or ValueError."""
    schema = json.loads(value) if isinstance(value, str) else dict(value)
    if not isinstance(schema, dict):
        raise ValueError("must be a JSON object")
    return json.dumps(schema, allow_nan=False)
