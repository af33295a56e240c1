"""The harness' model class on our engine: texts -> ids -> log-probabilities and greedy text.

Texts become ids as in the harness' class for transformers, so that answers can be compared: with the begin-of-sequence
token where Hugging Face's tokenizer puts it, and control tokens count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ..engine import LLM, SamplingParams
from ..engine.scoring import Score, score
from ..errors import RequestError
from ..progress import ProgressBar
from .tasks import LENGTHS, answer_tokens

BATCH = 64  # answers that are asked for together
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class EngineLM(TemplateLM):
    """An LLM with a tokenizer, as lm-evaluation-harness asks models."""

    def __init__(self, llm: LLM, *, adapter: str | None = None, seed: int = 0, max_length: int | None = None
                 ) -> None:
        """adapter: the one that answers. seed: of tasks that sample. max_length: tokens that the model sees at a time,
        if not its whole context."""
        super().__init__()
        if llm.tokenizer is None:
            raise RequestError("a model to be evaluated: must have a tokenizer")
        self.llm, self.adapter, self.seed = llm, adapter, seed
        self.text_tokenizer = llm.tokenizer  # the harness reads `tokenizer` as one of transformers
        self.max_length = max_length or llm.max_length

    # ---- texts and ids ------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int | None:
        return self.text_tokenizer.eos_id if self.text_tokenizer.eos_id is not None else min(
            self.llm.eos_ids, default=None)

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is: the token that begins a sequence, or else ends one."""
        first = self.eot_token_id if self.llm.bos_id is None else self.llm.bos_id
        if first is None:
            raise RequestError("a text without context: needs a tokenizer with a token that begins or ends a sequence")
        return first

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        ids = self.text_tokenizer.encode(string, special=True)
        begin = [] if self.text_tokenizer.bos_id is None else [self.text_tokenizer.bos_id]
        if add_special_tokens is None:
            add_special_tokens = self.text_tokenizer.adds_bos and ids[:1] != begin
        return begin + ids if add_special_tokens else ids

    @property
    def tokenizer_name(self) -> str:
        return str(self.llm.names[0])

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.text_tokenizer.template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.text_tokenizer.chat(chat_history, add_generation_prompt=add_generation_prompt,
                                        continue_final_message=not add_generation_prompt)

    # ---- log-probabilities --------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any,
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy) of each continuation; contexts lose their beginning where both are longer
        than the model's context."""
        pairs = []
        for _texts, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise RequestError(f"a continuation has {len(continuation)} tokens: must fit the model's context of "
                                   f"{self.max_length} (max_position_embeddings, or max_length)")
            pairs.append((context[-(self.max_length + 1 - len(continuation)) :], continuation))
        with ProgressBar(total=sum(len(a) + len(b) for a, b in pairs), unit="token", desc="score",
                         disable=disable_tqdm) as bar:
            def note(place: int, one: Score) -> None:
                if (texts := requests[place][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, (one.logprob, one.greedy))
                bar.update(sum(map(len, pairs[place])))

            return [(one.logprob, one.greedy) for one in score(self.llm, pairs, adapter=self.adapter, on_score=note)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in windows of the model's context."""
        windows, counts = list[tuple[Any, list[int], list[int]]](), []
        for request in requests:
            (text,) = request.args
            own = [make_disjoint_window(pair) for pair in get_rolling_token_windows(
                token_list=self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length,
                context_len=1)]
            windows += [(None, *pair) for pair in own]
            counts.append(len(own))
        scores, sums = iter(self._loglikelihood_tokens(windows, disable_tqdm)), []
        for request, count in zip(requests, counts, strict=True):
            sums.append(sum(next(scores)[0] for _ in range(count)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, sums[-1])
        return sums

    # ---- text ---------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text after each context up to a stop string, greedy unless the task says otherwise."""
        asked = [self._asked(*request.args) for request in requests]
        texts: list[str] = []
        with ProgressBar(total=len(requests), unit="answer", desc="generate", disable=disable_tqdm) as bar:
            for start in range(0, len(asked), BATCH):
                batch = asked[start : start + BATCH]
                done = self.llm.generate([ids for ids, _ in batch], [params for _, params in batch],
                                         adapter=self.adapter)
                for request, one in zip(requests[start:], done, strict=False):
                    self.cache_hook.add_partial("generate_until", request.args, one.text)
                texts += [one.text for one in done]
                bar.update(len(batch))
        return texts

    def _asked(self, context: str, settings: Mapping[str, Any]) -> tuple[list[int], SamplingParams]:
        """The prompt's ids and parameters. Contexts lose their beginning where the answer needs the room."""
        given = dict(settings)
        until = given.pop("until", None) or []
        stop = [until] if isinstance(until, str) else [one for one in until if one]
        most = answer_tokens({name: given.pop(name) for name in LENGTHS if name in given})
        if most >= self.max_length:
            raise RequestError(f"an answer of {most} tokens (max_gen_toks): must leave room in the model's context of "
                               f"{self.max_length}")
        sampling = {name: given.pop(name) for name in SAMPLING if name in given}
        if not (given.pop("do_sample", None) or (sampling.get("temperature") or 0) > 0):
            sampling = {"temperature": 0.0}
        if given:
            raise RequestError(f"generation_kwargs: {', '.join(given)}: not known to this engine")
        params = SamplingParams(**({"top_p": 1.0, "temperature": 1.0} | sampling), max_tokens=most, stop=tuple(stop),
                                seed=self.seed, stop_token_ids=tuple(self._control(stop)))
        ids = self.tok_encode(context)[-(self.max_length - most) :] or [self.prefix_token_id]
        return ids, params

    def _control(self, stop: Iterable[str]) -> Iterable[int]:
        """Stop strings that are control tokens, which the text leaves out."""
        for text in stop:
            if self.text_tokenizer.control_in(text) == text:
                yield self.text_tokenizer.encode(text, special=True)[0]
