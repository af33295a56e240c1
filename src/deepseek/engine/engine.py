"""Prompts -> texts: the simple exact form.

The life of a batch:

    1. every prompt becomes token ids and is checked, before any work is done
    2. prompts are padded on the left, so that all rows end at the same place, and run through the model once (prefill)
    3. each row samples its next token from its own generator; the token's text goes through the row's stop strings
    4. finished rows leave the batch and the cache; the others run on, one token a step (decode)

Padding is masked and positions count tokens only, so a prompt's logits do not depend on its neighbours: not at all with
a quantised model and the native kernels, else up to the rounding of differently shaped sums (1e-6 of FP32 logits).

Shape letters: B rows of the batch, T tokens of the call, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..atlas.usage import ExpertUsage
from ..checkpoint import Dtype, load_model, resolve
from ..errors import ConfigError, DataError, RequestError
from ..model import CausalLM, LatentCache, RoutingRecord
from ..model.mla import Order
from ..tokenizer import Tokenizer
from .sampler import SamplingParams, sample

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]
FinishReason = Literal["stop", "length"]
CACHE_AHEAD = 256  # positions reserved beyond the prompt; the cache doubles when they are used up


@dataclass(frozen=True)
class RequestOutput:
    """What became of one prompt.

    token_ids: every sampled token, the one that ended the text included. finish_reason: "stop" (end of sequence or a
    stop string) or "length" (max_tokens, or the end of the model's context).
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int

    @property
    def usage(self) -> dict[str, int]:
        """Token counts under OpenAI's names."""
        new = len(self.token_ids)
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": new, "total_tokens": self.prompt_tokens + new}


class StopText:
    """Text that arrives in pieces and ends before the first stop string.

    What could be the beginning of a stop string is held back until more is known, so that no part of one gets out. Of
    several stop strings the one that is complete first counts, however the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.stopped = False
        self._held = ""

    def push(self, piece: str) -> str:
        """Take a piece in; returns the text that is now certain."""
        if self.stopped or not piece:
            return ""
        held = self._held + piece
        found = [(start + len(stop), start) for stop in self.stops if (start := held.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return held[: min(found)[1]]
        keep = next((n for n in range(len(held), 0, -1) if any(stop.startswith(held[-n:]) for stop in self.stops)), 0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """The text is over: what was held back was no stop string after all."""
        held, self._held = self._held, ""
        return held


class _Request:
    """One row of a batch: its prompt, its random numbers, its tokens and its text so far."""

    def __init__(self, prompt_ids: list[int], params: SamplingParams, llm: LLM) -> None:
        self.prompt_ids, self.params, self.eos_ids = prompt_ids, params, llm.eos_ids
        self.limit = min(params.max_tokens, llm.max_length - len(prompt_ids))
        self.generator = params.generator()
        self.token_ids: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self._pieces = llm.tokenizer.stream() if llm.tokenizer is not None else None
        self._stop = StopText(params.stop)
        self._seen_V: Tensor | None = None
        if params.repetition_penalty != 1.0:
            self._seen_V = torch.zeros(llm.model.config.vocab_size, dtype=torch.bool)
            self._seen_V[prompt_ids] = True

    def advance(self, logits_V: Tensor) -> None:
        """Sample one token, extend the text and decide whether this was the last."""
        token = sample(logits_V, self.params, self.generator, self._seen_V)
        self.token_ids.append(token)
        if self._seen_V is not None:
            self._seen_V[token] = True
        ended = token in self.eos_ids and not self.params.ignore_eos
        if self._pieces is not None and not ended:
            self.text += self._stop.push(self._pieces.push(token))
        if ended or self._stop.stopped:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.limit:
            self.finish_reason = "length"
        if self.finish_reason and self._pieces is not None:
            self.text += self._stop.push(self._pieces.flush())
            self.text += self._stop.flush()
            if self._stop.stopped:
                self.finish_reason = "stop"

    def output(self) -> RequestOutput:
        assert self.finish_reason is not None
        return RequestOutput(self.text, tuple(self.token_ids), self.finish_reason, len(self.prompt_ids))


class LLM:
    """A model and its tokenizer, ready to continue prompts.

    path_or_model: a checkpoint folder, a known name, a hub id, or a CausalLM (used as it is, in evaluation mode;
    `dtype` and `device` then do not apply). tokenizer: instead of the one beside the checkpoint; a CausalLM without
    one takes token ids only and gives no text. batch_size: prompts that run together. adapter: as in `load_model`.
    Raises what `load_model` and `Tokenizer.load` raise, and ConfigError for an impossible batch_size.
    """

    def __init__(
        self, path_or_model: str | Path | CausalLM, *, tokenizer: Tokenizer | None = None, dtype: Dtype = "auto",
        device: torch.device | str = "cpu", batch_size: int = 32, adapter: str | Path | None = None,
    ) -> None:
        if not (isinstance(batch_size, int) and batch_size >= 1):
            raise ConfigError(f"batch_size = {batch_size!r}: must be an integer >= 1")
        if isinstance(path_or_model, CausalLM):
            self.model = path_or_model.eval()
        else:
            folder = resolve(path_or_model)
            tokenizer = tokenizer or Tokenizer.load(folder)
            self.model = load_model(folder, dtype, device, adapter=adapter)
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        config = self.model.config
        self.max_length = config.max_position_embeddings
        self.bos_id = config.bos_token_id if tokenizer is None else tokenizer.bos_id
        self.eos_ids = frozenset(config.eos_token_ids) | frozenset(() if tokenizer is None else tokenizer.eos_ids)

    # ---- the three verbs --------------------------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None, *,
        usage: ExpertUsage | None = None,
    ) -> list[RequestOutput]:
        """Continue every prompt; one result a prompt, in order.

        prompts: each a text, a list of token ids, or a list of chat messages `{"role", "content"}`.
        params: for all, or one a prompt. usage: counts the experts that prompt and output tokens visit.
        Raises RequestError, before any prompt runs, for a prompt that is empty, too long or of another kind.
        """
        if isinstance(prompts, str):
            raise RequestError(f"prompts = {prompts!r}: must be a list of prompts, not one text")
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise RequestError(f"params has {len(params)} entries: must be one for all or one for each of "
                               f"the {len(prompts)} prompts")
        requests = []
        for i, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
            try:
                requests.append(self._request(prompt, one))
            except RequestError as error:
                raise RequestError(f"prompt {i}: {error}") from None
        for start in range(0, len(requests), self.batch_size):
            for _ in self._steps(requests[start : start + self.batch_size], usage):
                pass
        return [request.output() for request in requests]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, usage: ExpertUsage | None = None
    ) -> Iterator[str]:
        """Yield the text of one prompt piece by piece; the pieces together are what `generate` returns.

        The prompt is checked at once, and run when the first piece is asked for.
        """
        request = self._request(prompt, params or SamplingParams())

        def pieces() -> Iterator[str]:
            sent = 0
            for _ in self._steps([request], usage):
                if len(request.text) > sent:
                    yield request.text[sent:]
                    sent = len(request.text)

        return pieces()

    def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, *, usage: ExpertUsage | None = None
    ) -> RequestOutput:
        """The assistant's answer to a conversation of `{"role", "content"}` messages."""
        return self.generate([messages], params, usage=usage)[0]

    # ---- steps ------------------------------------------------------------------------------------------------

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, as `generate` would run it: a text after the tokenizer's begin-of-sequence token, a
        conversation through its chat template, ids as they are; an empty prompt is the begin token alone.

        Raises RequestError for a prompt that cannot be run.
        """
        try:
            ids = self._ids(prompt)
        except DataError as error:  # half a surrogate pair, say
            raise RequestError(f"the prompt is not text: {error}") from None
        if not ids:
            if self.bos_id is None:
                raise RequestError("the prompt is empty and the tokenizer has no begin-of-sequence token to start from")
            ids = [self.bos_id]
        vocabulary = self.model.config.vocab_size
        if outside := [i for i in ids if not 0 <= i < vocabulary]:
            raise RequestError(f"token id {outside[0]}: must lie in the vocabulary 0..{vocabulary - 1}")
        if len(ids) >= self.max_length:
            raise RequestError(f"the prompt has {len(ids)} tokens: must leave room for a new one within the model's "
                               f"context (max_position_embeddings = {self.max_length})")
        return ids

    def _ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self._need_tokenizer("a text").encode(prompt, bos=self.bos_id is not None)
        if isinstance(prompt, Sequence) and all(type(part) is int for part in prompt):
            return list(prompt)  # type: ignore[arg-type]
        if isinstance(prompt, Sequence) and all(isinstance(part, Mapping) for part in prompt):
            return self._need_tokenizer("a conversation").encode_chat(prompt)  # type: ignore[arg-type]
        raise RequestError(f"{prompt!r:.80}: must be a text, a list of token ids or a list of messages")

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(f"{what} needs a tokenizer, and this model was given without one")
        return self.tokenizer

    def _request(self, prompt: Prompt, params: SamplingParams) -> _Request:
        if params.stop:
            self._need_tokenizer("a stop string")
        return _Request(self.encode(prompt), params, self)

    @torch.inference_mode()
    def _steps(self, batch: list[_Request], usage: ExpertUsage | None) -> Iterator[None]:
        """Run a batch to its end; yields after every token."""
        model, device = self.model, self.model.device
        ids_BT, mask_BT = _pad_left([request.prompt_ids for request in batch], device)
        cache = LatentCache(
            model.config, len(batch), ids_BT.shape[1] + min(CACHE_AHEAD, max(request.limit for request in batch)),
            dtype=model.compute_dtype or model.lm_head.weight.dtype, device=device)
        mask: Tensor | None = mask_BT
        order: Order = "naive"  # of a prompt, even of one token: beside a longer one it has no other
        while True:
            routing = RoutingRecord() if usage is not None else None
            logits_BV = model(ids_BT, mask_BT=mask, cache=cache, routing=routing, order=order, last_only=True)[:, -1]
            logits_BV, order = logits_BV.cpu(), "absorbed"
            if usage is not None and routing is not None:
                usage.add(routing, None if mask is None else mask.flatten())
            for request, logits_V in zip(batch, logits_BV, strict=True):
                request.advance(logits_V)
            yield
            alive = [row for row, request in enumerate(batch) if request.finish_reason is None]
            if not alive:
                return
            if len(alive) < len(batch):
                cache.select(torch.tensor(alive, device=device))
                batch = [batch[row] for row in alive]
            ids_BT, mask = torch.tensor([[request.token_ids[-1]] for request in batch], device=device), None


def _pad_left(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids [B, T] and the mask of real tokens; padding holds id 0, which nothing looks at."""
    longest = max(map(len, rows))
    ids_BT = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    lengths_B1 = torch.tensor([[len(row)] for row in rows], device=device)
    return ids_BT, torch.arange(longest, device=device) >= longest - lengths_B1
