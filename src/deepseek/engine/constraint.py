"""Output that must match a JSON schema, a regular expression or a grammar.

Before each token llguidance says which tokens may come next: those after which the text can still become one that
matches. All others get the logit -inf, so whatever is sampled fits; the text may end only where it matches.

The library sees the tokenizer's tokens as the bytes they are in a text. Control tokens and ids beyond the tokenizer's
are none and never come: text that spells `<|User|>` is allowed where it matches, the token is not. The library's own
end of sequence is one id past the vocabulary; it stands for whichever ids end a text, for none under `ignore_eos`.

Where nothing can follow, the text is finished without an end-of-sequence token; so it is where the only way on is a
byte that no token has. A grammar that outgrows the library's limits ends its request with an error.

Grammars come from clients. Their size is bounded before anything reads them; they are compiled on a thread with a large
stack, because the library recurses along chains of rules and references; and the library's own limits bound what a mask
may cost (`LIMITS`): with DeepSeek-V3's vocabulary a schema's mask takes below 1 ms, and `s: s s s | s s | /[a-z ]/`
is refused after 20 ms, where the library's own limits let it take 0.5 s a token.

Shape letters: V vocabulary.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import RequestError
from ..tokenizer import BYTES, Tokenizer
from .sampler import SamplingParams

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

GRAMMARS, LARGE = 32, 4  # compiled ones that are kept; of those with more than SMALL bytes, which may hold 100 MB
SMALL = 2 << 10
BYTES_AT_MOST = {"json_schema": 256 << 10, "regex": 8 << 10, "grammar": 64 << 10}
PATTERN_BYTES = 8 << 10  # of a schema's patterns, of a grammar's longest line: automata grow with their square
STACK = 256 << 20  # 20,000 chained rules need less; 2,700 need more than the usual 8 MiB
LIMITS: Any = {"step_max_items": 10_000, "max_items_in_row": 500, "step_lexer_fuel": 100_000,
               "initial_lexer_fuel": 500_000, "max_lexer_states": 50_000, "verbose_errors": False}
# White space without a bound lets a model write it for ever. A schema's `x-guidance` may set another pattern.
JSON_DEFAULTS: Any = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,40}"}


class Constraint:
    """What one text may go on with. finished: nothing can follow what was accepted."""

    def __init__(self, matcher: LLMatcher, text_V: Tensor, eos_ids: frozenset[int]) -> None:
        """matcher: nobody else's. text_V: True for tokens that are text. eos_ids: end it."""
        self._matcher, self._text_V, self._eos = matcher, text_V, sorted(eos_ids)
        self.finished = False
        self._look()

    def _look(self) -> bool:
        """Ask what may come next; whether there is more than the end."""
        mask = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.bool)
        self._check()
        self.allowed_V = mask[: len(self._text_V)] & self._text_V
        more = bool(self.allowed_V.any())
        self.allowed_V[self._eos] = bool(mask[-1]) and not self._matcher.is_error()
        return more

    def _check(self) -> None:
        """Raises RequestError where the library gave up."""
        if self._matcher.is_error() and not (why := self._matcher.get_error()).startswith("NoExtension"):  # no token
            raise RequestError(f"the constraint outgrew its limits: {' '.join(why.split()):.200}")

    def allow(self, logits_V: Tensor) -> Tensor:
        """The logits with -inf for every token that may not come next."""
        return logits_V.masked_fill(~self.allowed_V.to(logits_V.device), -torch.inf)

    def accept(self, token: int) -> None:
        """The text goes on with `token`, one of the allowed."""
        consumed = self._matcher.consume_token(token)
        self._check()
        self.finished = not (consumed and self._look())


class Constraints:
    """Makes the constraints of an LLM's requests. The first one loads the library; a grammar is compiled once.

    vocabulary: of the model, which may have more than the tokenizer's.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocabulary: int, eos_ids: frozenset[int]) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._eos_ids = frozenset(i for i in eos_ids if i < vocabulary)
        self._compiled, self._large = lru_cache(GRAMMARS)(self._compile), lru_cache(LARGE)(self._compile)

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
            _check_size(field, source)
            compiled = self._compiled if len(source) <= SMALL else self._large
            matcher = compiled(field, source).deep_copy()
        except (TypeError, ValueError, RecursionError) as error:  # what json and the library raise for bad input
            raise RequestError(f"{field} = {value!r:.80}: {' '.join(str(error).split()):.400}") from None
        constraint = Constraint(matcher, text_V, frozenset() if params.ignore_eos else self._eos_ids)
        if not constraint.allowed_V.any():
            raise RequestError(f"{field} = {value!r:.80}: no token can begin a text that matches")
        return constraint

    def _compile(self, field: str, source: str) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        def compiled() -> LLMatcher:
            if field == "json_schema":
                grammar = LLMatcher.grammar_from_json_schema(source, defaults=JSON_DEFAULTS)
            else:
                grammar = (LLMatcher.grammar_from_regex if field == "regex" else LLMatcher.grammar_from_lark)(source)
            return LLMatcher(self._tokens[0], grammar, log_level=0, limits=LLParserLimits(**LIMITS))

        matcher = _with_stack(compiled)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher

    @cached_property
    def _tokens(self) -> tuple[LLTokenizer, Tensor]:
        """The library's view of the tokenizer, and a boolean [V]: True for tokens that are text."""
        if self._tokenizer is None:
            raise RequestError("constrained output needs a tokenizer, and this model was given without one")
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError:
            raise RequestError("constrained output needs the package llguidance (pip install 'moe-dr[llguidance]')"
                               ) from None
        tokens = _Tokens(self._tokenizer, self._vocabulary, self._eos_ids)
        return LLTokenizer(TokenizerWrapper(tokens)), torch.tensor(list(map(bool, tokens.tokens[: self._vocabulary])))


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
    return json.dumps(schema)


def _check_size(field: str, source: str) -> None:
    """Raises ValueError for what is too large to be compiled."""
    if (size := len(source.encode())) > (most := BYTES_AT_MOST[field]):
        raise ValueError(f"has {size:,} bytes: must be at most {most:,}")
    patterns = sum(map(len, re.findall(r'"pattern(?:Properties)?"\s*:\s*("(?:[^"\\]|\\.)*"|\{)', source))) \
        if field == "json_schema" else max(map(len, source.splitlines()), default=0)
    if patterns > PATTERN_BYTES:
        raise ValueError(f"has regular expressions of {patterns:,} characters: must be at most {PATTERN_BYTES:,}")


_stack_lock = threading.Lock()


def _with_stack(work: Callable[[], LLMatcher]) -> LLMatcher:
    """What `work` returns or raises, run on a thread with a large stack."""
    with _stack_lock:  # the size is a setting of the process; a pool starts its thread at the first submission
        usual = threading.stack_size(STACK)
        try:
            pool = ThreadPoolExecutor(1)
            future = pool.submit(work)
        finally:
            threading.stack_size(usual)
    with pool:
        return future.result()
