"""Requests -> tokens. The life of a request:

    1. `add`: its prompt is token ids by now; what it asks is checked before anything is done
    2. schedule: it waits until there is room for it, is served what is known of its prefix, and gets pages for the rest
    3. run: its prompt goes through the model in pieces, beside the tokens of others; then one token a step
    4. postprocess: each row draws its next token from its own generator; the token's text goes through the stop strings
    5. it ends (end of sequence, stop string, length, abort), and its pages go back at once

Every token's numbers are its own: with a quantized model and the native kernels a request gets the same bits alone, in
a batch, in pieces, after stepping back, with and without the prefix cache. With plain weights sums are rounded in
another order when batches differ, and greedy tokens differ where two logits are that close.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..atlas import Atlas
from ..atlas.atlas import Shape
from ..atlas.usage import ExpertUsage
from ..checkpoint import UNNAMED
from ..config import ModelConfig
from ..errors import ConfigError, RequestError
from ..model import CausalLM, RoutingRecord
from ..model.adapters import names_on
from ..model.cache import PAGE, Chunk, LatentPool
from ..ops.native import native
from ..quant.fused import FusedCausalLM, absorbs
from .expert_affinity import ExpertAffinity
from .options import EngineOptions
from .pages import Pages
from .request import FinishReason, Request
from .residency import Residency
from .routing_override import RoutingOverride
from .runner import Runner, part, routed
from .scheduler import Scheduler, Work, pages_needed
from .speculative import Drafter

# told of a step that is over: what ran, in the order of its tokens, their routes, seconds; it must be quick
Observer = Callable[[Sequence[Work], RoutingRecord | None, float], None]
log = logging.getLogger("deepseek.engine")
PATIENCE, WAIT = 0.005, 0.02  # seconds for the masks of a step's requests; where nothing else is to be done
CACHE_SHARE = 0.25  # of the memory that is free at the start, for the latent pool at most


@dataclass
class Counters:
    """Since the engine began. computed: tokens that ran through the model; cached: prompt tokens served from the tree
    of prefixes; sampled: new ones."""

    steps: int = 0
    computed: int = 0
    cached: int = 0
    sampled: int = 0
    finished: int = 0
    aborted: int = 0


class Engine:
    """Runs requests on a model. One step at a time; any thread may add, abort and step."""

    def __init__(self, model: CausalLM, options: EngineOptions | None = None, *, atlas: Atlas | None = None,
                 residency: Residency | None = None) -> None:
        self.model, self.options, self.atlas = model, options or EngineOptions(), atlas
        self.residency = residency
        model.check_gates()
        config = model.config
        dtype = model.compute_dtype or model.lm_head.weight.dtype
        count = _pool_pages(model, self.options, dtype)
        speculate = self.options.speculate and len(model.model.mtp) > 0
        layers = config.num_hidden_layers + speculate
        pool = LatentPool(config, count, layers=layers, dtype=dtype, device=model.device)
        self.drafter = Drafter(model, pool) if speculate else None
        self.pages = Pages(pool, prefix_cache=self.options.prefix_cache)
        self.affinity = ExpertAffinity(config, atlas)
        self.scheduler = Scheduler(
            self.pages, self.affinity, batch_size=self.options.batch_size, step_tokens=self.options.step_tokens,
            policy=self.options.policy, age_limit=self.options.age_limit)
        self.runner = Runner(model, pool)
        self.adapters = names_on(model)
        self._absorbed = {name for name, targets in self.adapters.items() if absorbs(model, targets)}
        self.counters = Counters()
        self.observer: Observer | None = None
        self.lock = threading.RLock()
        self.stalled = False  # the last step had nothing to run: all wait for their readers
        self._drafted: dict[int, RoutingRecord] = {}  # where the drafts of this step went

    @property
    def exact(self) -> bool:
        """Whether a request's bits are the same in any company (see the top of this file)."""
        return native is not None and isinstance(self.model, FusedCausalLM) and self.model.device.type == "cpu"

    @property
    def idle(self) -> bool:
        return self.scheduler.idle

    # ---- requests -----------------------------------------------------------------------------------------------

    def check(self, *requests: Request) -> None:
        """Raises RequestError for what can never run; several are to run together."""
        need = sum(pages_needed(len(request.prompt_ids) + request.limit) for request in requests)
        if need > self.pages.count:
            most = sum(len(request.prompt_ids) + request.limit for request in requests)
            raise RequestError(f"prompt and max_tokens are {most} tokens: must fit the cache of "
                               f"{self.pages.count * PAGE} (cache_tokens)")
        for request in requests:
            self._check_ids(request)
            if request.adapter is not None and request.adapter not in self.adapters:
                raise RequestError(f"adapter = {request.adapter!r}: there is "
                                   f"{', '.join(map(repr, self.adapters)) or 'none'}")
            request.order = "absorbed" if request.adapter in self._absorbed else "naive"
            if request.params.routed and not self.model.config.moe_layers:
                raise RequestError("routed = True: this model has no routed experts")
            if request.params.experts is not None and request.routing_override is None:
                loaded = None if self.residency is None else self.residency.loaded
                request.routing_override = RoutingOverride(request.params.experts, self.model, self.atlas, loaded)
            request.checked = True

    def _check_ids(self, request: Request) -> None:
        last = self.model.config.vocab_size - 1
        for field in ("stop_token_ids", "logit_bias"):
            for token in getattr(request.params, field) or ():
                if token > last:
                    raise RequestError(f"{field}: token id {token}: must lie in the vocabulary 0..{last}")

    def add(self, *requests: Request) -> None:
        """Queue requests, in this order with no other between them. Raises RequestError for one that can never run."""
        for request in requests:
            if not request.checked:
                self.check(request)
        with self.lock:
            for request in requests:
                if request.finish_reason is None:  # else its caller has left already
                    self.scheduler.add(request)

    def abort(self, request: Request) -> None:
        """End a request at once, and those coupled with it; their pages go back. Nothing happens to one that has
        ended."""
        with self.lock:
            for one in [request] if request.coupling is None else request.coupling.members:
                if one.finish_reason is None:
                    self.counters.aborted += 1
                    self._end(one, "abort")
                    self._tell(one)

    def _end(self, request: Request, reason: FinishReason | None = None) -> None:
        if reason is not None:
            request.end(reason)
        self.scheduler.finish(request)
        self.affinity.finish(request)

    def _fail(self, request: Request, error: Exception) -> None:
        """End a request, and those coupled with it, with an error that its caller will raise."""
        for one in [request] if request.coupling is None else request.coupling.members:
            if one.finish_reason is None:
                one.error = error
                self._end(one, "error")

    def _tell(self, request: Request) -> None:
        try:
            if request.on_token is not None:
                request.on_token(request)
        except Exception as error:  # of the caller's own
            self._fail(request, error)

    # ---- a step -------------------------------------------------------------------------------------------------

    def step(self) -> list[Request]:
        """Run one step; the requests that got a token. What goes wrong ends the requests that it concerns: their
        `error` says why, and nobody else notices."""
        with self.lock:
            settled = self._settle(0.0)
            works = self.scheduler.schedule()
            self.stalled = not works and not any(one.pending for one in self.scheduler.running)
            moved: list[Request] = []
            try:
                if works:
                    moved = self._run(works)
            except Exception as error:  # the model's, or the disk's: nobody's tokens can be trusted
                for work in works:
                    self._fail(work.request, error)
            settled += self._settle(PATIENCE if works else WAIT)
            failed = [work.request for work in works if work.request.error is not None]
            for request in {one.number: one for one in (*moved, *failed, *settled)}.values():
                self._tell(request)
            return moved

    def _settle(self, seconds: float) -> list[Request]:
        """Wait for pending constraints, for all of them together `seconds` at most; the requests that have ended.

        Those that were late before are not waited for, unless there is nothing else to do.
        """
        deadline = time.monotonic() + seconds
        ended = []
        for request in [one for one in (*self.scheduler.running, *self.scheduler.waiting) if one.pending]:
            hurry = seconds < WAIT and request.constraint is not None and request.constraint.late
            try:
                if request.settle(0.0 if hurry else max(0.0, deadline - time.monotonic())) and (
                        request.finish_reason is not None):
                    self._finished(request)
                    ended.append(request)
            except Exception as error:  # its grammar's
                self._fail(request, error)
                ended += [request] if request.coupling is None else request.coupling.members
        return ended

    def _finished(self, request: Request) -> None:
        self.counters.finished += 1
        self._end(request)

    def _run(self, works: Sequence[Work]) -> list[Request]:
        watched = self.residency is not None or self.observer is not None
        record = bool(self.model.config.moe_layers) and (watched or any(
            work.request.params.routed or work.request.usage is not None or self._signs(work) for work in works))
        began = time.perf_counter()
        logits, hidden, routing = self.runner.run(works, [work.request.routing_override for work in works], record)
        if routing is not None:
            self._count(works, routing)
        self.counters.steps += 1
        sampled = self.counters.sampled
        moved: list[Request] = []
        for work, logits_SV, own in zip(works, logits, hidden, strict=True):
            if work.request.finish_reason is not None:  # a mate of one that failed
                continue
            self._computed(work)
            if work.request.pooled is not None:
                work.request.pool(work.chunk.past, own)
            if work.request.unscored:
                try:
                    self.runner.score(work, own)
                except Exception as error:
                    self._fail(work.request, error)
                    continue
            for row, logits_V in enumerate(logits_SV):
                try:
                    if row and not self._accepted(work):
                        break
                    moved += self._advance(work.request, logits_V)
                except Exception as error:  # its logits', or its grammar's
                    self._fail(work.request, error)
                    break
        if self.drafter is not None:
            self._draft(works, hidden, began, self.counters.sampled - sampled)
        if self.observer is not None:
            try:
                self.observer(works, routing, time.perf_counter() - began)
            except Exception:  # whoever watches must not harm what is watched
                log.exception("the engine's observer failed")
        return moved

    def _count(self, works: Sequence[Work], routing: RoutingRecord) -> None:
        if self.residency is not None:
            self.residency.after(routing)
        self._drafted, start = {}, 0
        masks: dict[int, tuple[ExpertUsage, torch.Tensor]] = {}
        for work in works:
            request, stop = work.request, start + work.chunk.tokens
            if work.draft is not None:  # whether it is one of the request's tokens is not known yet
                stop -= 1
                self._drafted[request.number] = part(routing, stop, stop + 1)
            for usage in self._counted(request):
                mask_T = masks.setdefault(id(usage), (usage, torch.zeros(sum(w.chunk.tokens for w in works),
                                                                        dtype=torch.bool)))[1]
                mask_T[start:stop] = True
            if self._signs(work) or request.params.routed:
                index_TLK = routed(routing, start, stop)
                if self._signs(work):
                    self.affinity.measure(request, index_TLK)
                self._routed(request, work.chunk.past, index_TLK)
            start += work.chunk.tokens
        for usage, mask_T in masks.values():
            usage.add(routing, mask_T)

    @staticmethod
    def _counted(request: Request) -> list[ExpertUsage]:
        """Where the experts of its tokens are counted: in what its caller gave, and in its adapter's part of that."""
        usage = request.usage
        if usage is None or request.adapter in (None, UNNAMED):
            return [] if usage is None else [usage]
        return [usage, usage.part(request.adapter)]

    def _signs(self, work: Work) -> bool:
        """Whether its request is to be known by where this work's tokens went: those of prompts, if anybody asks."""
        return self.options.policy == "expert" and work.prompt

    def _routed(self, request: Request, first: int, index_TLK: torch.Tensor) -> None:
        """Where the tokens of a request at positions first, … went."""
        skip = sum(map(len, request.routed)) - first  # known from before it stepped back
        if request.params.routed and 0 <= skip < len(index_TLK):
            asked = request.params.experts
            top = asked.top_k if asked is not None and asked.top_k else self.model.config.num_experts_per_tok
            request.routed.append(index_TLK[skip:, :, :top])  # beyond are places that others have more of

    def _accepted(self, work: Work) -> bool:
        """Whether a request goes on behind its draft: it is what was drawn."""
        assert self.drafter is not None
        request = work.request
        if request.finish_reason is not None or request.token_ids[-1] != work.draft or not request.settle(PATIENCE):
            return False
        if request.finish_reason is not None:  # its constraint's last token, as is known now
            self._finished(request)
            return False
        self.drafter.stats.accepted += 1
        request.computed += 1
        self.counters.computed += 1
        if (own := self._drafted.get(request.number)) is not None:
            for usage in self._counted(request):
                usage.add(own)
            if request.params.routed:
                self._routed(request, request.computed - 1, routed(own, 0, 1))
        return True

    def _draft(self, works: Sequence[Work], hidden: Sequence[torch.Tensor], began: float, tokens: int) -> None:
        """Drafts for the next step, where they pay."""
        assert self.drafter is not None
        running = self.scheduler.running
        choice = self.drafter.gain.of(max(1, len(running)))
        drafts = any(work.draft is not None for work in works)
        self.drafter.stats.drafted += sum(work.draft is not None for work in works)
        chosen = []
        for work, own in zip(works, hidden, strict=True):
            request, past = work.request, work.chunk.past
            request.draft = None
            if request.finish_reason is None and request.coupling is None and request.followed == past:
                chosen.append((request, Chunk(request.computed - past, past, request.table.pages, work.chunk.order),
                               own[: request.computed - past]))
        prompts = any(work.prompt for work in works)
        if choice.drafts() or prompts:
            self.drafter.draft(chosen)
        if not choice.drafts():
            for request in running:
                request.draft = None
        if tokens and not prompts:
            choice.add(drafts, time.perf_counter() - began, tokens)

    def _computed(self, work: Work) -> None:
        request, chunk = work.request, work.chunk
        prefilled, certain = request.prefilling, chunk.tokens - (work.draft is not None)
        request.computed += certain
        self.counters.computed += certain
        if prefilled and not request.prefilling:
            self.counters.cached += request.cached_tokens
            self.scheduler.file(request)
        elif request.computed // PAGE > request.table.filed:
            self.scheduler.file(request, request.computed // PAGE * PAGE)

    def _advance(self, request: Request, logits_V: torch.Tensor) -> list[Request]:
        """One more token for a request, or for all that it is coupled with."""
        moved = [request]
        if request.limit <= 0:  # the prompt alone was asked for
            request.end("length")
            self._finished(request)
            return moved
        if (coupling := request.coupling) is not None:
            mixed_V = coupling.offer(request, logits_V)
            if mixed_V is None:
                return []
            moved = [member for member in coupling.members if member.finish_reason is None]
            logits_V = mixed_V
        token = moved[0].choose(logits_V)
        for one in moved:
            one.append(token)
            self.counters.sampled += 1
            if one.finish_reason is not None:
                self._finished(one)
        return moved


def _pool_pages(model: CausalLM, options: EngineOptions, dtype: torch.dtype) -> int:
    config = model.config
    if options.cache_tokens is not None:
        return pages_needed(options.cache_tokens)
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    full = pages_needed(config.max_position_embeddings)
    layers = config.num_hidden_layers + (options.speculate and len(model.model.mtp) > 0)
    affordable = int(CACHE_SHARE * free) // LatentPool.page_bytes(config, layers, dtype)
    return max(full, min(options.batch_size * full, affordable))


def atlas_beside(folder: Path, config: ModelConfig) -> Atlas | None:
    """The atlas of a checkpoint folder, None where there is none. Raises ConfigError for that of another model."""
    if not (folder / "atlas.json").is_file():
        return None
    atlas = Atlas.load(folder)
    if atlas.shape != (shape := Shape.of(config)):
        raise ConfigError(f"{folder / 'atlas.json'} is of a model with {atlas.shape}: must be {shape}")
    return atlas
