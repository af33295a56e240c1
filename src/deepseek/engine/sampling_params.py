"""How one request is continued: SamplingParams, checked when made. Imports no torch: flags are made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from ..errors import RequestError
from ..settings import NATURAL, NOT_NEGATIVE, POSITIVE, UP_TO_ONE, Option, Rule, between, check, is_int, is_number

if TYPE_CHECKING:
    import torch

    from .routing_override import ExpertControl
else:
    ExpertControl = Any


def _is_control(value: object) -> bool:
    from .routing_override import ExpertControl

    return isinstance(value, ExpertControl)


def _are_biases(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        is_int(key) and key >= 0 and is_number(bias) and -100 <= bias <= 100 for key, bias in value.items())


PENALTY: Rule = "must lie in [-2, 2]", lambda v: is_number(v) and -2 <= v <= 2


class SamplingOptions(TypedDict, total=False):
    """SamplingParams as keyword arguments, for type checkers and editors."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    seed: int | None
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    min_tokens: int
    skip_special_tokens: bool
    ignore_eos: bool
    n: int
    logprobs: int | None
    prompt_logprobs: int | None
    json_schema: str | Mapping[str, Any] | None
    regex: str | None
    grammar: str | None
    experts: ExpertControl | None
    routed: bool


@dataclass(frozen=True)
class SamplingParams:
    """How one request is continued. Names are those of the OpenAI and vLLM interfaces; temperature and top_p default to
    what DeepSeek recommends for its models (the server's to OpenAI's, which are 1).

    One stop string may be given bare. A constraint that allows nothing else ends the text before min_tokens. At most
    one of json_schema, regex and grammar is given. Raises RequestError naming field, value and rule.
    """

    max_tokens: Annotated[int, Option("new tokens at most; 0 runs the prompt alone", NATURAL)] = 256
    temperature: Annotated[float, Option("0 is greedy", NOT_NEGATIVE)] = 0.6
    top_k: Annotated[int, Option("keep this many of the likeliest tokens; 0 keeps all", (
        "must be an integer >= 0 (0 is off)", NATURAL[1]))] = 0
    top_p: Annotated[float, Option("keep the likeliest tokens up to this probability; 1 keeps all", (
        "must lie in (0, 1]", lambda v: is_number(v) and 0 < v <= 1))] = 0.95
    min_p: Annotated[float, Option(
        "drop tokens below this share of the likeliest one's probability; 0 keeps all", UP_TO_ONE)] = 0.0
    repetition_penalty: Annotated[float, Option(
        "above 1 discourages tokens of the prompt and the text; 1 is off", (
            "must be a number > 0", POSITIVE[1]))] = 1.0
    presence_penalty: Annotated[float, Option("above 0 discourages tokens of the text; 0 is off", PENALTY)] = 0.0
    frequency_penalty: Annotated[float, Option("the same, growing with each repetition; 0 is off", PENALTY)] = 0.0
    logit_bias: Annotated[Mapping[int, float] | None, Option("token id -> number, added to its logit", (
        "must be token ids with numbers from -100 to 100", _are_biases))] = None
    seed: Annotated[int | None, Option("makes sampling repeatable; else a fresh one is drawn", (
        "must be an integer of 64 bits", lambda v: is_int(v) and -(2**63) <= v < 2**63))] = None
    stop: Annotated[tuple[str, ...], Option(
        "text that ends the answer and is no part of it; may be several", metavar="TEXT", each=True)] = ()
    stop_token_ids: Annotated[tuple[int, ...], Option("tokens that end the answer likewise", (
        "must be token ids, integers >= 0",
        lambda v: isinstance(v, tuple) and all(is_int(token) and token >= 0 for token in v)))] = ()
    min_tokens: Annotated[int, Option("new tokens before which neither end of sequence nor stop ends the text")] = 0
    skip_special_tokens: Annotated[bool, Option("leave special tokens out of the text")] = True
    ignore_eos: Annotated[bool, Option("go on past the end-of-sequence token")] = False
    n: Annotated[int, Option("continuations of the prompt, with seeds seed, seed + 1, …", between(1, 128))] = 1
    logprobs: Annotated[int | None, Option(
        "report each token's log-probability and those of this many likeliest ones, before temperature, top_k, top_p, "
        "min_p, logit_bias and penalties", between(0, 100))] = None
    prompt_logprobs: Annotated[int | None, Option("the same, of the prompt's own tokens", between(0, 100))] = None
    json_schema: Annotated[str | Mapping[str, Any] | None, Option("JSON schema that the text matches", (
        "must be a JSON text or an object", lambda v: isinstance(v, str | Mapping)), "FILE")] = None
    regex: Annotated[str | None, Option("regular expression that the text matches")] = None
    grammar: Annotated[str | None, Option("grammar (Lark) that the text matches")] = None
    experts: Annotated[ExpertControl | None, Option("changes what the gates decide, inexact", (
        "must be an ExpertControl", _is_control))] = None
    routed: Annotated[bool, Option("report the experts that every token visited")] = False

    def __post_init__(self) -> None:
        if isinstance(self.logit_bias, Mapping):  # JSON has no keys but texts
            object.__setattr__(self, "logit_bias", {_id(key): value for key, value in self.logit_bias.items()})
        check(self, RequestError)
        if not (is_int(self.min_tokens) and 0 <= self.min_tokens <= self.max_tokens):
            raise RequestError(f"min_tokens = {self.min_tokens!r}: must be an integer from 0 to max_tokens "
                               f"({self.max_tokens})")
        given = [name for name in ("json_schema", "regex", "grammar") if getattr(self, name) is not None]
        if len(given) > 1:
            raise RequestError(f"{' and '.join(given)} are given: must be one of them at most")

    def generator(self) -> torch.Generator:
        """A generator for one request: seeded with `seed`, or from the system's entropy."""
        import torch

        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def _id(key: object) -> object:
    return int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 20 else key
