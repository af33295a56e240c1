"""Adapts engine state to metrics, labels requests, and serves /metrics, /v1/feedback and /dashboard."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import torch
from fastapi import FastAPI, Query, Request
from fastapi.responses import HTMLResponse, Response
from torch import Tensor

from ..engine import LLM
from ..engine.request import Request as Generation
from ..engine.routing import Answer
from ..files import to_json
from ..language import NONE, language
from ..model.cache import PAGE
from ..watch.counters import ServingCounters
from ..watch.history import HistoryError
from ..watch.metrics import MetricKey, key
from ..watch.monitor import Monitor
from ..watch.options import WatchOptions
from .bodies import takes
from .middleware import ServeError, log
from .pages import page
from .protocol import FeedbackRequest

ANSWERS = 4096  # the last ones, which can be rated
BY_NAME = "model"  # the scorer of a trace whose member was named by the client
MIXTURE = "mixture"  # what any mixture of adapters is counted as
CLIENT = 256  # characters of a client's name that are kept


class Watch:
    """Counts the requests and steps of a server until it is closed."""

    def __init__(self, llm: LLM, name: str, options: WatchOptions, *, texts: bool = False,
                 members: Mapping[str, str] | None = None) -> None:
        """texts: prompts and answers go to the log. members: as of ServingCounters."""
        self.llm, self.texts = llm, texts
        self.known: dict[int, dict[str, str]] = {}  # the rest of a request's line in the log of texts
        self.counters = ServingCounters(llm.model.config, llm.engine.atlas,
                                        (name, *llm.adapters, MIXTURE) if llm.adapters else (), members)
        self.monitor = Monitor(name, self.counters, self._engine, options, resident=self._resident,
                               missed=self._missed)
        self.answers: OrderedDict[str, str | None] = OrderedDict()  # id -> domain
        llm.engine.listeners.append(self.counters)
        # the table of languages takes a second, which no request should wait for; the thread holds nothing of the
        # server, so that a process that ends meanwhile frees the model
        self.languages = threading.Thread(target=language, args=("",), daemon=True)
        self.languages.start()

    def close(self) -> None:
        if self.counters in self.llm.engine.listeners:
            self.llm.engine.listeners.remove(self.counters)
        self.monitor.close()

    # ---- engine state -------------------------------------------------------------------------------------------

    def _engine(self) -> dict[MetricKey, float]:
        engine = self.llm.engine
        own, scheduler = engine.stats, engine.scheduler
        out: dict[MetricKey, float] = {
            key("tokens_total", "computed"): own.computed, key("tokens_total", "cached"): own.cached,
            key("tokens_total", "sampled"): own.sampled, key("requests_running"): len(scheduler.running),
            key("requests_waiting"): len(scheduler.waiting), key("preempted_total"): scheduler.preempted,
            key("cache_free_positions"): engine.block_manager.available * PAGE}
        if engine.residency is not None:
            stats = engine.residency.stats
            out |= {key("experts_wanted_total"): stats.wanted, key("experts_missed_total"): stats.missed,
                    key("experts_late_total"): stats.late, key("experts_prefetched_total"): stats.prefetched,
                    key("prefetch_hits_total"): stats.prefetch_hits, key("expert_stall_seconds_total"): stats.stall,
                    key("expert_read_bytes_total"): stats.read}
        return out

    def _resident(self) -> Tensor | None:
        residency = self.llm.engine.residency
        return None if residency is None else torch.stack([residency.loaded(i) for i in range(len(residency.layers))])

    def _missed(self) -> Tensor | None:
        residency = self.llm.engine.residency
        return None if residency is None else residency.missed_LE

    # ---- requests -----------------------------------------------------------------------------------------------

    def begin(self, answer: str, http: Request, user: str | None, text: str, requests: Sequence[Generation]) -> None:
        """Label the requests of an answer, before they run."""
        client = "".join(c if c.isprintable() else "?" for c in (user or key_name(http))[:CLIENT])
        tags = {"client": client, "language": self.language_of(text)}
        if self.llm.adapters:
            adapter = requests[0].adapter or self.monitor.model
            tags["adapter"] = adapter if isinstance(adapter, str) else MIXTURE
        for request in requests:
            request.metric_labels = tags
            if self.texts:
                self.known[request.request_id] = {"request_id": http.state.request_id, "answer": answer, "prompt": text}
        self.answers[answer] = requests[0].domain
        if len(self.answers) > ANSWERS:
            self.answers.popitem(last=False)

    def routed(self, answer: Answer, domain: str | None, seconds: float) -> None:
        """Count the last decision of an answer. domain: what the client said that it is about. seconds: it took."""
        part, add = answer.trace[-1], self.counters.add
        if any(member["kind"] == "knowledge" for member in part["members"]):
            add("pool_retrievals_total", "hit" if part.get("passages") else "empty")
        add("pool_seconds_total", by=seconds)
        if part["scorer"] == BY_NAME:
            return
        chosen = part["members"][0]["name"]
        add("pool_decisions_total", chosen)
        for member in part["members"]:
            add("pool_weight_total", member["name"], by=member["weight"])
        if answer.divided:
            add("pool_parts_total")
            if len(answer.trace) == 1:
                add("pool_composite_total")
        elif (label := self.counters.member(domain)) is not None:
            add("pool_labelled_total", label)
            add("pool_correct_total", label, by=float(label == chosen))

    def language_of(self, text: str) -> str:
        """The text's language, "und" while the table is being loaded."""
        return NONE if self.languages.is_alive() else language(text)

    def end(self, request: Generation, late: bool) -> None:
        """Count a request that has ended. late: by a timeout, which counts as an error."""
        assert request.finish_reason is not None and request.finished is not None
        if self.texts:
            log.info(to_json(self.known.pop(request.request_id, {}) | {"text": request.text}, ensure_ascii=False))
        first = None if request.first_token is None else request.first_token - request.arrived
        new = len(request.token_ids)
        each = None
        if request.first_token is not None and new > 1:
            each = (request.finished - request.first_token) / (new - 1)
        self.counters.finished(request.request_id, request.domain, "error" if late else request.finish_reason, first,
                               each, request.metric_labels.get("adapter"))


def key_name(http: Request) -> str:
    """The name of a client that sent no `user`: a hash of its API key."""
    _, _, key = http.headers.get("authorization", "").partition(" ")
    return f"key-{hashlib.sha256(key.encode()).hexdigest()[:8]}" if key else "anonymous"


def add_routes(app: FastAPI, watch: Watch) -> None:
    board = page("watch", "page.html")
    monitor, pool = watch.monitor, ThreadPoolExecutor(2, "watch")  # its own: others wait for the engine

    async def answer(make: Callable[[], Any]) -> Response:
        """A JSON response that is made and encoded in a thread."""
        body = await asyncio.get_running_loop().run_in_executor(pool, lambda: json.dumps(make(), allow_nan=False))
        return Response(body, media_type="application/json")

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        body = await asyncio.get_running_loop().run_in_executor(pool, monitor.metrics)
        return Response(body, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.post("/v1/feedback", openapi_extra=takes(FeedbackRequest))
    async def feedback(http: Request) -> dict[str, Any]:
        body = await http.app.state.server.read(http, FeedbackRequest)
        if body.id not in watch.answers:
            raise ServeError(404, f"id = {body.id!r}: is none of the last {ANSWERS:,} answers", param="id",
                             code="answer_not_found")
        domain = watch.answers[body.id]
        try:
            new = await asyncio.get_running_loop().run_in_executor(
                pool, monitor.history.rate, time.time(), body.id, watch.counters.groups.label(domain), body.rating,
                body.comment)
        except HistoryError as error:
            raise ServeError(503, str(error), kind="server_error", code="history_failed",
                             headers={"retry-after": "60"}) from None
        if not new:
            raise ServeError(409, f"id = {body.id!r}: has been rated before", param="id", code="already_rated")
        watch.counters.count("feedback_total", domain, body.rating)
        return {"object": "feedback", "id": body.id, "rating": body.rating}

    @app.get("/dashboard", response_class=HTMLResponse)
    async def dashboard() -> HTMLResponse:
        return board()

    @app.get("/dashboard/state", response_class=Response)
    async def state() -> Response:
        return await answer(lambda: asdict(monitor.state()))

    @app.get("/dashboard/heat", response_class=Response)
    async def heat() -> Response:
        return await answer(monitor.heat)

    @app.get("/dashboard/series", response_class=Response)
    async def series(minutes: float = Query(60.0, gt=0, le=60 * 24 * 365)) -> Response:
        return await answer(lambda: monitor.series(minutes))
