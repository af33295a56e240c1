"""Requests -> tokens. The life of a request:

    1. `add`: its prompt is token ids by now; what it asks is checked before anything is done
    2. schedule: it waits until there is room for it; its cached prefix is matched, pages are allocated for the rest
    3. run: its prompt goes through the model in pieces, beside the tokens of others; then one token a step
    4. postprocess: each row draws its next token from its own generator; the token's text goes through the stop strings
    5. listeners of the step's output count experts, keep routes, feed the monitor
    6. it ends (end of sequence, stop string, length, abort), and its pages are freed at once

Every token's numbers are its own: with a quantized model and the native kernels a request gets the same bits alone, in
a batch, in pieces, after preemption, with and without the prefix cache. With plain weights sums are rounded in
another order when batches differ, and greedy tokens differ where two logits are that close.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..atlas import Atlas
from ..atlas.atlas import Shape
from ..config import ModelConfig
from ..errors import ConfigError, RequestError
from ..model import CausalLM
from ..model.adapters import names_in, names_on
from ..model.cache import PAGE, LatentPool
from ..quant.native_stack import NativeStack
from .block_manager import BlockManager, pages_needed
from .expert_affinity import ExpertAffinity
from .options import EngineOptions
from .request import Request
from .residency import Residency
from .routing_override import RoutingOverride, named
from .runner import Runner
from .scheduler import Scheduler
from .speculative import Drafter
from .step_output import RouteRecorder, ScheduledRequest, StepListener, StepOutput, UsageRecorder

log = logging.getLogger("deepseek.engine")
PATIENCE, WAIT = 0.005, 0.02  # seconds for the masks of a step's requests; where nothing else is to be done
CACHE_SHARE = 0.25  # of the memory that is free at the start, for the latent pool at most


@dataclass
class EngineStats:
    """Since the engine began. computed: tokens that ran through the model; cached: prompt tokens served from the prefix
    cache; sampled: new ones. routing_tokens, routing_seconds: of prompts that ran for a pool's scorer `gate` alone,
    which are computed, too."""

    steps: int = 0
    computed: int = 0
    cached: int = 0
    sampled: int = 0
    finished: int = 0
    aborted: int = 0
    routing_tokens: int = 0
    routing_seconds: float = 0.0


class Engine:
    """Runs requests on a model. One step at a time; any thread may add, abort and step."""

    def __init__(self, model: CausalLM, options: EngineOptions | None = None, *, atlas: Atlas | None = None,
                 residency: Residency | None = None) -> None:
        self.model, self.options, self.atlas = model, options or EngineOptions(), atlas
        self.residency = residency
        model.check_gates()
        config = model.config
        beside = NativeStack.beside(model)
        dtype = torch.float32 if beside else model.compute_dtype or model.lm_head.weight.dtype
        count = _pool_pages(model, self.options, dtype)
        speculate = self.options.speculate and len(model.model.mtp) > 0
        layers = config.num_hidden_layers + speculate
        pool = LatentPool(config, count, layers=layers, dtype=dtype, device=model.device)
        self.drafter = Drafter(model, pool, beside) if speculate else None
        self.block_manager = BlockManager(pool, prefix_cache=self.options.prefix_cache)
        self.affinity = ExpertAffinity(config, atlas)
        self.scheduler = Scheduler(self.block_manager, self.affinity, self.options)
        self.runner = Runner(model, pool, beside)
        self.adapters = names_on(model)
        stack = NativeStack.of(model)
        self._absorbed = {name for name, targets in self.adapters.items() if stack and stack.absorbs(targets)}
        self.stats = EngineStats()
        self.lock = threading.RLock()
        self.stalled = False  # the last step had nothing to run: all wait for their readers
        self.listeners: list[StepListener] = []  # others', such as a monitor: what goes wrong there is logged
        self._recorders: list[StepListener] = [UsageRecorder(), RouteRecorder(config.num_experts_per_tok)]
        self._recorders += [residency] if residency is not None else []
        self._recorders += [self.affinity] if self.options.policy == "expert" else []

    @property
    def exact(self) -> bool:
        """Whether a request's bits are the same in any company (see the top of this file)."""
        return NativeStack.exact(self.model)

    @property
    def idle(self) -> bool:
        return self.scheduler.idle

    # ---- requests -----------------------------------------------------------------------------------------------

    def check(self, *requests: Request) -> None:
        """Raises RequestError for what can never run; several are to run together."""
        need = sum(pages_needed(len(request.prompt_ids) + request.max_new_tokens) for request in requests)
        if need > self.block_manager.count:
            most = sum(len(request.prompt_ids) + request.max_new_tokens for request in requests)
            raise RequestError(f"prompt and max_tokens are {most} tokens: must fit the cache of "
                               f"{self.block_manager.count * PAGE} (cache_tokens)")
        for request in requests:
            self._check_ids(request)
            members = names_in(request.adapter)
            if unknown := [name for name in members if name not in self.adapters]:
                raise RequestError(f"adapter = {unknown[0]!r}: there is "
                                   f"{', '.join(map(repr, self.adapters)) or 'none'}")
            request.sequence.attn_impl = "naive" if self._absorbed.isdisjoint(members) else "absorbed"
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
                    self._read_ahead(request.ahead)

    def _read_ahead(self, names: Sequence[str]) -> None:
        """Begin to read the experts of named groups, in the order of the layers."""
        if self.residency is None or not names:
            return
        rows = {layer: row for row, layer in enumerate(self.model.config.moe_layers)}
        for layer, experts in sorted(item for name in names for item in named(name, self.atlas).by_layer().items()):
            self.residency.prefetch(rows[layer], experts)

    def abort(self, *requests: Request) -> None:
        """End requests at once, and their ensembles with them, and free their pages. Nothing happens to those that have
        ended."""
        with self.lock:
            aborted = []
            for one in (mate for request in requests for mate in request.mates):
                if one.finish_reason is None:
                    one.end("abort")
                    aborted.append(one)
            self.stats.aborted += len(aborted)
            self._remove_ended()
            for one in aborted:
                one.done.set()  # also where it has not been added yet
                self._tell(one)

    def abort_all(self) -> None:
        with self.lock:
            self.abort(*self.scheduler.requests)

    def fail(self, requests: Sequence[Request], error: Exception) -> None:
        """End requests with an error that their callers will raise."""
        with self.lock:
            for request in requests:
                self._fail(request, error)
            for request in self._remove_ended():
                self._tell(request)

    def _fail(self, request: Request, error: Exception) -> None:
        """End a request, and its ensemble with it, with an error that its caller will raise."""
        for one in request.mates:
            if one.finish_reason is None:
                one.error = error
                one.end("error")

    def _tell(self, request: Request) -> None:
        try:
            if request.on_token is not None:
                request.on_token(request)
        except Exception as error:  # of the caller's own
            self._fail(request, error)
            self._remove_ended()

    # ---- a step -------------------------------------------------------------------------------------------------

    def step(self) -> list[Request]:
        """Run one step; returns the requests that got a token. A failure ends only the affected requests and is stored
        in request.error."""
        with self.lock:
            ended = self._settle(0.0)
            batch, advanced = self.scheduler.schedule(), list[Request]()
            self.stalled = not batch and not any(one.pending for one in self.scheduler.running)
            try:
                if batch:
                    output = self.runner.run(batch, self._wants_routes(batch))
                    self.postprocess(output)
                    advanced = output.advanced
            except Exception as error:  # the model's, or the disk's: no token of the batch can be trusted
                for scheduled in batch:
                    scheduled.request.error = error
                    self._fail(scheduled.request, error)
            ended += self._settle(PATIENCE if batch else WAIT)
            for request in {one.request_id: one for one in (*advanced, *ended)}.values():
                self._tell(request)
            return advanced

    def _wants_routes(self, batch: Sequence[ScheduledRequest]) -> bool:
        return bool(self.model.config.moe_layers) and any(
            listener.wants_routes(batch) for listener in (*self._recorders, *self.listeners))

    def _settle(self, seconds: float) -> list[Request]:
        """Wait for pending constraints, for all of them together `seconds` at most; remove and return the requests that
        have ended.

        Those that were late before are not waited for, unless there is nothing else to do.
        """
        deadline = time.monotonic() + seconds
        for request in self.scheduler.requests:
            if not request.pending or request.finish_reason is not None:
                continue
            hurry = seconds < WAIT and request.constraint is not None and request.constraint.late
            try:
                request.settle(0.0 if hurry else max(0.0, deadline - time.monotonic()))
            except Exception as error:  # its grammar's
                self._fail(request, error)
        return self._remove_ended()

    def _remove_ended(self) -> list[Request]:
        """Free what the requests that have ended hold; returns them."""
        ended = [one for one in self.scheduler.requests if one.finish_reason is not None]
        for request in ended:
            self.stats.finished += request.finish_reason in ("stop", "length")
            self.scheduler.finish(request)
            self.affinity.finish(request)
            request.done.set()
        return ended

    def postprocess(self, output: StepOutput) -> None:
        """Draw the next tokens from the step's logits, leave drafts, and pass the output to the listeners."""
        sampled = self.stats.sampled
        self.stats.steps += 1
        for scheduled, logits_SV, hidden_TH in zip(output.batch, output.logits, output.hidden, strict=True):
            if scheduled.request.finish_reason is not None:  # a mate of one that failed
                continue
            try:
                self._process(output, scheduled, logits_SV, hidden_TH)
            except Exception as error:  # its logits', or its grammar's
                self._fail(scheduled.request, error)
        if self.drafter is not None:
            running = [one for one in self.scheduler.running if one.finish_reason is None]
            self.drafter.after_step(output, running, self.stats.sampled - sampled)
        output.seconds = time.perf_counter() - output.began
        for recorder in self._recorders:
            recorder.on_step(output)
        for listener in tuple(self.listeners):
            try:
                listener.on_step(output)
            except Exception:  # a listener must not harm what runs
                log.exception("a listener of the engine's steps failed")

    def _process(self, output: StepOutput, scheduled: ScheduledRequest, logits_SV: Tensor, hidden_TH: Tensor) -> None:
        request = scheduled.request
        self._count_computed(scheduled)
        if request.pooled is not None:
            request.pool(scheduled.chunk.past, hidden_TH)
        if request.unscored:
            self.runner.score(scheduled, hidden_TH)
        for row, logits_V in enumerate(logits_SV):
            if row and not self._accepts(scheduled):
                break
            if row:
                output.accepted.add(request.request_id)
            output.advanced += self._advance(request, logits_V)

    def _count_computed(self, scheduled: ScheduledRequest) -> None:
        request, sequence = scheduled.request, scheduled.request.sequence
        prefilled, certain = sequence.prefilling, scheduled.chunk.tokens - (scheduled.draft is not None)
        sequence.num_computed_tokens += certain
        self.stats.computed += certain
        if prefilled and not sequence.prefilling:
            self.stats.cached += sequence.cached_tokens
            self.scheduler.insert_prefix(request)
        elif (full := sequence.num_computed_tokens // PAGE) > sequence.block_table.num_inserted:
            self.scheduler.insert_prefix(request, full * PAGE)

    def _accepts(self, scheduled: ScheduledRequest) -> bool:
        """Whether a request goes on behind its draft: it is what was drawn."""
        request = scheduled.request
        if request.finish_reason is not None or request.token_ids[-1] != scheduled.draft or not (
                request.settle(PATIENCE)) or request.finish_reason is not None:  # by its constraint's last token
            return False
        request.sequence.num_computed_tokens += 1
        self.stats.computed += 1
        return True

    def _advance(self, request: Request, logits_V: Tensor) -> list[Request]:
        """One more token for a request, or for all of its ensemble; those that got it."""
        if request.max_new_tokens <= 0:  # the prompt alone was asked for
            request.end("length")
            return [request]
        advanced = [one for one in request.mates if one.finish_reason is None]
        if request.ensemble is not None:
            mixed_V = request.ensemble.offer(request, logits_V)
            if mixed_V is None:
                return []
            logits_V = mixed_V
        token = advanced[0].sample(logits_V)
        if request.ensemble is not None:
            request.ensemble.drew(token)
        for one in advanced:
            one.append(token)
        self.stats.sampled += len(advanced)
        return advanced


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
    return max(full, min(options.max_num_seqs * full, affordable))


def atlas_beside(folder: Path) -> Atlas | None:
    """The atlas of a checkpoint folder, None where there is none."""
    return Atlas.load(folder) if (folder / "atlas.json").is_file() else None


def check_atlas(atlas: Atlas | None, folder: Path, config: ModelConfig) -> None:
    """Raises ConfigError for the atlas of another model."""
    if atlas is not None and atlas.shape != (shape := Shape.of(config)):
        raise ConfigError(f"{folder / 'atlas.json'} is of a model with {atlas.shape}: must be {shape}")
