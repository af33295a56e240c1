"""Samples a server: every few seconds a snapshot goes to the history and the alerts.

It is shown as figures (dashboard, terminal), as a heat map, as curves, and as metrics for Prometheus.

`reader` gives what only the engine's owner knows, under the names of metrics.py. Rates are of the last minute, shares
and alerts of the last `minutes`.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from ..errors import ConfigError
from ..files import to_json
from .alerts import Alert, AlertLimits, Alerts, ratios
from .counters import Counts, ServingCounters
from .history import History
from .metrics import RENAMED, Snapshot, delta, exposition, key, quantile, total_delta, values
from .power import MachineSampler

MINUTE = 60.0
COUNTS = 12  # copies of what was counted of routes that are kept of a window: its begin is that exact
HUNDRED_MILLION = 1e8
log = logging.getLogger("deepseek.watch")


@dataclass(frozen=True)
class WatchOptions:
    """interval: seconds between two snapshots. alert_minutes: the window of shares and alerts. alert_webhook: address
    that is told of alerts by POST. history: SQLite file, None keeps it in memory; history_days: how long.
    price_per_hour: of this machine. Raises ConfigError naming option, value and rule."""

    interval: float = 5.0
    alert_minutes: float = 10.0
    alert_webhook: str | None = None
    history: Path | None = None
    history_days: float = 30.0
    price_per_hour: float | None = None

    def __post_init__(self) -> None:
        for name, most in (("interval", 3600), ("alert_minutes", 120), ("history_days", 3650)):
            if not 0 < getattr(self, name) <= most:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be above 0 and at most {most}")
        if self.price_per_hour is not None and not 0 <= self.price_per_hour < math.inf:
            raise ConfigError(f"price_per_hour = {self.price_per_hour}: must be 0 or more")
        if self.alert_webhook is not None:
            try:
                parts = urlsplit(self.alert_webhook)
                good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            except ValueError:  # a port that is none
                good = False
            if not good:
                raise ConfigError(f"alert_webhook = {self.alert_webhook!r}: must be an address that begins with "
                                  "http:// or https://")


class Monitor:
    """Watches until it is closed. model: what the model is called."""

    def __init__(self, model: str, counters: ServingCounters, reader: Callable[[], Snapshot],
                 options: WatchOptions | None = None, *, resident: Callable[[], Tensor | None] = lambda: None,
                 missed: Callable[[], Tensor | None] = lambda: None, machine: MachineSampler | None = None) -> None:
        """resident: boolean [L, E], the experts in memory; missed: int64 [L, E], how often each was not; None where all
        always are."""
        self.model, self.counters, self.reader = model, counters, reader
        self.options = options or WatchOptions()
        self.resident, self.missed = resident, missed
        self.machine = machine or MachineSampler()
        self.history = History(self.options.history, self.options.history_days)
        sinks = [self._log, self._keep, *([self._post] if self.options.alert_webhook else [])]
        self.alerts = Alerts(AlertLimits(minutes=self.options.alert_minutes), sinks)
        self._poster = ThreadPoolExecutor(1, "webhook")  # one: an alert's end must not overtake its beginning
        self.began = time.time()
        self._lock = threading.Lock()
        self._machine: Snapshot = {}
        self._sample_seconds = 0.0
        self._past: deque[tuple[float, Snapshot]] = deque()  # of the last minutes
        self._counts: deque[tuple[float, Counts]] = deque([(self.began, counters.now())])  # some of them
        self._over = threading.Event()
        self.sample()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self._poster.shutdown(wait=False, cancel_futures=True)
        self.history.close()

    def _run(self) -> None:
        thinned = time.monotonic()
        while not self._over.wait(self.options.interval):
            try:
                self.sample()
                if time.monotonic() - thinned > MINUTE:
                    self.history.thin(time.time())
                    thinned = time.monotonic()
            except Exception:  # a full disk, say: the server goes on, and says so
                log.exception("watch: no snapshot this time")

    # ---- snapshots -----------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, float]:
        """Every number by now."""
        out = self.counters.snapshot(self._counts[0][1]) | dict(self.reader()) | dict(self._machine)
        out["watch_seconds_total"] += self._sample_seconds
        groups = self.counters.groups
        for name, source in (("group_resident_ratio", self.resident()), ("group_missed_total", self.missed())):
            if source is not None and groups.names:
                sum_G = torch.einsum("le,leg->g", source.double(), groups.member_LEG.double())
                if name == "group_resident_ratio":
                    sum_G = sum_G / groups.member_LEG.sum((0, 1))
                out |= {key(name, group): float(value) for group, value in zip(groups.names, sum_G, strict=True)}
        if self.options.price_per_hour is not None:
            out["price_per_hour"] = self.options.price_per_hour
        return out

    def sample(self) -> list[Alert]:
        """Take a snapshot, keep it, and see what is wrong."""
        with self._lock:
            now, began = time.time(), time.perf_counter()
            window = MINUTE * self.options.alert_minutes
            self._machine = self.machine.read()
            if now - self._counts[-1][0] >= window / COUNTS:
                self._counts.append((now, self.counters.now()))
            snapshot = self.snapshot()
            self._past.append((now, snapshot))
            for kept in (self._past, self._counts):
                while len(kept) > 2 and kept[1][0] <= now - window:
                    kept.popleft()
            found = self.alerts.evaluate(now, snapshot)
            self.history.add(now, {name: value for name, value in snapshot.items() if not name.startswith("slice_")})
            self._sample_seconds += time.perf_counter() - began
            return found

    def metrics(self) -> bytes:
        """As Prometheus scrapes them."""
        return exposition(self.snapshot())

    # ---- alerts go to -------------------------------------------------------------------------------------------

    def _log(self, alert: Alert, begins: bool) -> None:
        log.warning(to_json({"alert": alert.rule, "status": "firing" if begins else "over",
                                "subject": alert.subject, "message": alert.message}, ensure_ascii=False))

    def _keep(self, alert: Alert, begins: bool) -> None:
        self.history.alert(time.time(), alert.rule, alert.subject, begins, alert.message)

    def _post(self, alert: Alert, begins: bool) -> None:
        """In a thread of its own: whoever listens may be slow. Its address may hold a secret: the log has its host."""
        body = to_json(alert.to_dict() | {"status": "firing" if begins else "over", "model": self.model}).encode()

        def post() -> None:
            address = str(self.options.alert_webhook)
            request = urllib.request.Request(address, body, {"content-type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=10):
                    pass
            except (OSError, HTTPException, ValueError) as error:
                log.warning(to_json({"webhook": urlsplit(address).hostname, "error": str(error)}))

        self._poster.submit(post)

    # ---- for people ---------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything that is on the dashboard but the heat map and the curves, for JSON."""
        now, snapshot, groups = time.time(), self.snapshot(), self.counters.groups
        with self._lock:
            past = list(self._past)
            recent = self.counters.now().since(self._counts[0][1])
        start, old = past[0]
        minute = next((entry for entry in past if entry[0] >= now - MINUTE), past[-1])
        share, slots = ratios(snapshot, old), total_delta(snapshot, old, "slots_total")
        own: list[dict[str, Any]] = []
        for g, name in enumerate(groups.names):
            labelled = delta(snapshot, old, f"labelled_tokens_total|{name}")
            wanted = delta(snapshot, old, f"group_wanted_total|{name}")
            missed = snapshot.get(f"group_missed_total|{name}")
            own.append({
                "name": name, "ratio": share.get(name), "expected": float(groups.expected_LG[:, g].mean()),
                "share": None if not slots else sum(
                    delta(snapshot, old, f"group_slots_total|{name}|{band}") for band in groups.bands) / slots,
                "bands": {band: _ratio(delta(snapshot, old, f"group_slots_total|{name}|{band}"),
                                      delta(snapshot, old, f"group_expected_slots_total|{name}|{band}"))
                          for band in groups.bands},
                "accuracy": _ratio(delta(snapshot, old, f"correct_tokens_total|{name}"), labelled),
                "labelled": labelled,
                "drift": snapshot.get(f"drift|{name}"), "resident": snapshot.get(f"group_resident_ratio|{name}"),
                "hits": None if missed is None else _ratio(
                    max(0.0, wanted - delta(snapshot, old, f"group_missed_total|{name}")), wanted)})
        labelled = total_delta(snapshot, old, "labelled_tokens_total")
        return {
            "model": self.model, "time": now, "began": self.began, "minutes": self.options.alert_minutes,
            "step": _ratio(delta(snapshot, old, "step_seconds_total"), delta(snapshot, old, "steps_total")),
            "distinct": _ratio(delta(snapshot, old, "distinct_experts_total"),
                              delta(snapshot, old, "distinct_experts_expected_total")),
            "figures": {name: value for name, value in snapshot.items() if "|" not in name} | {
                old: snapshot[name] for old, name in RENAMED.items() if name in snapshot},
            "rates": rates(minute[0], minute[1], now, snapshot), "window": rates(start, old, now, snapshot),
            "groups": own, "band_names": list(groups.bands), "bands": {
                band: {name: snapshot.get(f"{name}|{band}") for name in ("routing_entropy", "max_vio", "dead_experts")}
                for band in groups.bands},
            "entropy_most": float(torch.tensor(float(max(groups.experts, 1))).log()),
            "accuracy": _ratio(total_delta(snapshot, old, "correct_tokens_total"), labelled), "chance": groups.chance(
                [delta(snapshot, old, f"labelled_tokens_total|{name}") for name in groups.names]),
            "conflicts": _ratio(delta(snapshot, old, "conflict_tokens_total"),
                               delta(snapshot, old, "judged_tokens_total")),
            "conflict_requests": _ratio(delta(snapshot, old, "conflict_requests_total"),
                                       delta(snapshot, old, "judged_requests_total")),
            "conflict": recent.conflict_GG.tolist(), "confusion": recent.confusion_GG.tolist(),
            "residency": residency(snapshot, old),
            "energy": {source: delta(snapshot, old, f"energy_joules_total|{source}")
                       for (source,) in values(snapshot, "energy_joules_total")},
            "business": business(snapshot, old), "comments": self.history.comments(),
            "alerts": [alert.to_dict() for alert in self.alerts.firing.values()], "past_alerts": self.history.alerts(),
            "slices": slices(snapshot, old)}

    def heat(self) -> dict[str, Any]:
        """Every expert's share of its layer's slots in the last minutes over what uniform routing gives it (null where
        nothing ran), and its groups: layers x experts."""
        groups = self.counters.groups
        with self._lock:
            slots_LE = self.counters.now().since(self._counts[0][1]).slots_DLE.sum(0).double()
        sum_L1 = slots_LE.sum(1, keepdim=True)
        ratio_LE = slots_LE / sum_L1.clamp(min=1) * groups.experts
        resident_LE = self.resident()
        return {"layers": list(groups.layers), "experts": groups.experts, "names": list(groups.names),
                "ratio": [[round(x, 3) for x in row] if total else None
                          for row, total in zip(ratio_LE.tolist(), sum_L1[:, 0].tolist(), strict=True)],
                "groups": [[[g for g, member in enumerate(own) if member] for own in row]
                           for row in groups.member_LEG.bool().tolist()],
                "resident": None if resident_LE is None else resident_LE.tolist()}

    def series(self, minutes: float = 60.0) -> dict[str, Any]:
        """Curves: what each stretch between two kept snapshots had; null where nothing ran."""
        past = self.history.snapshots(time.time() - MINUTE * minutes)
        times, curves, own = [], [], []
        for (start, old), (end, now) in pairwise(past):
            times.append(end)
            curves.append(rates(start, old, end, now))
            own.append(ratios(now, old))
        return {"time": times, "rates": {name: [curve[name] for curve in curves] for name in DRAWN},
                "groups": {name: [at.get(name) for at in own] for name in self.counters.groups.names}}


DRAWN = ("tokens", "new_tokens", "first_p50", "first_p99", "each_p50", "each_p99")


def rates(start: float, old: Snapshot, end: float, now: Snapshot) -> dict[str, float | None]:
    """Between two snapshots: tokens and new_tokens a second; percentiles of waits in seconds; energy in joules
    a token; cost of 10^8 tokens; counting's share of the steps' time."""
    seconds = max(end - start, 1e-9)
    run = delta(now, old, "tokens_total|computed") + delta(now, old, "tokens_total|cached")
    sources = [name for name in ("energy_joules_total|cpu", "energy_joules_total|gpu") if name in now]
    joules = sum(delta(now, old, name) for name in sources) if sources else None
    price = now.get("price_per_hour")
    return {
        "tokens": run / seconds, "new_tokens": delta(now, old, "tokens_total|sampled") / seconds,
        **{f"{which}_p{percent}": quantile(percent / 100, now, old, name) for which, name in (
            ("first", "time_to_first_token_seconds"), ("each", "request_time_per_output_token_seconds"))
           for percent in (50, 99)},
        "joules_per_token": None if joules is None else _ratio(joules, run),
        "cost": None if price is None else _ratio(price / 3600 * seconds * HUNDRED_MILLION, run),
        "watch": _ratio(delta(now, old, "watch_seconds_total"), delta(now, old, "step_seconds_total"))}


def residency(now: Snapshot, old: Snapshot) -> dict[str, float | None] | None:
    """None where all experts are always in memory."""
    if "experts_wanted_total" not in now:
        return None
    wanted, prefetched = delta(now, old, "experts_wanted_total"), delta(now, old, "experts_prefetched_total")
    missed = delta(now, old, "experts_missed_total") + delta(now, old, "experts_late_total")
    return {"hits": _ratio(max(0.0, wanted - missed), wanted),
            "prefetch_hits": _ratio(delta(now, old, "prefetch_hits_total"), prefetched),
            "stall": _ratio(delta(now, old, "expert_stall_seconds_total"), delta(now, old, "step_seconds_total")),
            "read_bytes": delta(now, old, "expert_read_bytes_total")}


def business(now: Snapshot, old: Snapshot) -> list[dict[str, Any]]:
    """By domain: how requests ended, tools, schemas, feedback."""
    out = []
    for domain in sorted({domain for name in ("requests_total", "feedback_total") for domain, _ in values(now, name)}):
        def parts(name: str, domain: str = domain) -> dict[str, float]:
            return {outcome: delta(now, old, f"{name}|{own}|{outcome}") for own, outcome in values(now, name)
                    if own == domain}

        ended, tools, schemas, feedback = map(parts, (
            "requests_total", "tool_calls_total", "schema_answers_total", "feedback_total"))
        if not sum(ended.values()) + sum(feedback.values()):
            continue
        out.append({"domain": domain, "requests": sum(ended.values()), "ended": ended,
                    "completed": _ratio(ended.get("stop", 0.0), sum(ended.values())),
                    "tools": _ratio(tools.get("right", 0.0), sum(tools.values())),
                    "schemas": _ratio(schemas.get("valid", 0.0), sum(schemas.values())),
                    "satisfied": _ratio(feedback.get("up", 0.0), sum(feedback.values())),
                    "rated": sum(feedback.values())})
    return out


def slices(now: Snapshot, old: Snapshot, most: int = 5) -> dict[str, list[tuple[str, float]]]:
    """The largest of each kind, with their share of the tokens."""
    found: dict[str, list[tuple[str, float]]] = {}
    for kind, value in values(now, "slice_tokens_total"):
        found.setdefault(kind, []).append((value, delta(now, old, f"slice_tokens_total|{kind}|{value}")))
    return {kind: [(value, tokens / max(1.0, sum(n for _, n in own)))
                   for value, tokens in sorted(own, key=lambda entry: -entry[1])[:most] if tokens]
            for kind, own in found.items()}


def _ratio(part: float, total: float) -> float | None:
    return part / total if total else None

