"""Samples a server: every few seconds a snapshot goes to the history and the alerts.

It is shown as figures (dashboard, terminal), as a heat map, as curves, and as metrics for Prometheus.

`reader` returns the metrics that only the engine's owner knows. Rates are of the last minute, shares and alerts of the
last `alert_minutes`.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import urllib.request
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from http.client import HTTPException
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from ..files import to_json
from .alerts import Alert, AlertLimits, Alerts, ratios, shares
from .counters import Counts, ServingCounters
from .history import History
from .metrics import METRICS, RENAMED, MetricKey, Snapshot, delta, exposition, key, total_delta, values
from .options import WatchOptions
from .power import MachineSampler
from .state import GroupState, MonitorState, business, pool, rates, ratio, residency, slices

MINUTE = 60.0
COUNTS = 12  # copies of what was counted of routes that are kept of a window: its begin is that exact
DRAWN = ("tokens", "new_tokens", "first_p50", "first_p99", "each_p50", "each_p99")  # of Rates, as curves
CURVES, SMOOTHED = 10, 24  # members of a pool; their shares are of so many snapshots
log = logging.getLogger("deepseek.watch")


class Monitor:
    """Samples a server until it is closed. model: its name."""

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

    def snapshot(self) -> dict[MetricKey, float]:
        """All numbers."""
        out = self.counters.snapshot(self._counts[0][1]) | dict(self.reader()) | dict(self._machine)
        out[key("watch_seconds_total")] += self._sample_seconds
        groups = self.counters.groups
        for name, source in (("group_resident_ratio", self.resident()), ("group_missed_total", self.missed())):
            if source is not None and groups.names:
                sum_G = torch.einsum("le,leg->g", source.double(), groups.member_LEG.double())
                if name == "group_resident_ratio":
                    sum_G = sum_G / groups.member_LEG.sum((0, 1))
                out |= {key(name, group): float(value) for group, value in zip(groups.names, sum_G, strict=True)}
        if self.options.price_per_hour is not None:
            out[key("price_per_hour")] = self.options.price_per_hour
        return out

    def sample(self) -> list[Alert]:
        """Take a snapshot, keep it, and return the alerts that fire."""
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
            self.history.add(now, {own: value for own, value in snapshot.items() if own.name != "slice_tokens_total"})
            self._sample_seconds += time.perf_counter() - began
            return found

    def metrics(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return exposition(self.snapshot())

    # ---- alerts go to -------------------------------------------------------------------------------------------

    def _log(self, alert: Alert, begins: bool) -> None:
        log.warning(to_json({"alert": alert.rule, "status": "firing" if begins else "over",
                                "subject": alert.subject, "message": alert.message}, ensure_ascii=False))

    def _keep(self, alert: Alert, begins: bool) -> None:
        self.history.alert(time.time(), alert.rule, alert.subject, begins, alert.message)

    def _post(self, alert: Alert, begins: bool) -> None:
        """Send an alert to the webhook, in a thread. The address may hold a secret, so the log has only its host."""
        body = to_json(asdict(alert) | {"status": "firing" if begins else "over", "model": self.model}).encode()

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

    def state(self) -> MonitorState:
        now, snapshot, groups = time.time(), self.snapshot(), self.counters.groups
        with self._lock:
            past = list(self._past)
            recent = self.counters.now().since(self._counts[0][1])
        start, old = past[0]
        minute = next((entry for entry in past if entry[0] >= now - MINUTE), past[-1])

        def grown(name: str, *labels: str) -> float:
            return delta(snapshot, old, name, *labels)

        return MonitorState(
            model=self.model, time=now, began=self.began, minutes=self.options.alert_minutes,
            step=ratio(grown("step_seconds_total"), grown("steps_total")),
            distinct=ratio(grown("distinct_experts_total"), grown("distinct_experts_expected_total")),
            figures={own.name: value for own, value in snapshot.items() if not own.labels} | {
                former: snapshot[key(name)] for former, name in RENAMED.items()
                if not METRICS[name].labels and key(name) in snapshot},
            rates=rates(*minute, now, snapshot), window=rates(start, old, now, snapshot),
            groups=self._groups(snapshot, old), band_names=list(groups.bands), bands={
                band: {name: snapshot.get(key(name, band)) for name in ("routing_entropy", "max_vio", "dead_experts")}
                for band in groups.bands},
            entropy_most=math.log(max(groups.experts, 1)),
            accuracy=ratio(total_delta(snapshot, old, "correct_tokens_total"),
                           total_delta(snapshot, old, "labelled_tokens_total")),
            chance=groups.chance([grown("labelled_tokens_total", name) for name in groups.names]),
            conflicts=ratio(grown("conflict_tokens_total"), grown("judged_tokens_total")),
            conflict_requests=ratio(grown("conflict_requests_total"), grown("judged_requests_total")),
            conflict=recent.conflict_GG.tolist(), confusion=recent.confusion_GG.tolist(),
            residency=residency(snapshot, old), pool=pool(snapshot, old, self.counters.members), energy={
                source: grown("energy_joules_total", source) for (source,) in values(snapshot, "energy_joules_total")},
            business=business(snapshot, old), comments=self.history.comments(),
            alerts=[asdict(alert) for alert in self.alerts.firing.values()], past_alerts=self.history.alerts(),
            slices=slices(snapshot, old))

    def _groups(self, snapshot: Snapshot, old: Snapshot) -> list[GroupState]:
        groups = self.counters.groups
        by_group, slots = ratios(snapshot, old), total_delta(snapshot, old, "slots_total")
        out = []
        for g, name in enumerate(groups.names):
            labelled, wanted, missed = (delta(snapshot, old, what, name) for what in (
                "labelled_tokens_total", "group_wanted_total", "group_missed_total"))
            slots_of, expected_of = (
                {band: delta(snapshot, old, what, name, band) for band in groups.bands}
                for what in ("group_slots_total", "group_expected_slots_total"))
            out.append(GroupState(
                name, by_group.get(name), float(groups.expected_LG[:, g].mean()), ratio(sum(slots_of.values()), slots),
                {band: ratio(slots_of[band], expected_of[band]) for band in groups.bands},
                accuracy=ratio(delta(snapshot, old, "correct_tokens_total", name), labelled), labelled=labelled,
                drift=snapshot.get(key("drift", name)), resident=snapshot.get(key("group_resident_ratio", name)),
                hits=ratio(max(0.0, wanted - missed), wanted) if key("group_missed_total", name) in snapshot else None))
        return out

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
        """Curves: the rates between any two successive snapshots of the history; null where nothing ran."""
        past = self.history.snapshots(time.time() - MINUTE * minutes)
        times, curves, own, mixes = [], [], [], []
        for i, ((start, old), (end, now)) in enumerate(pairwise(past), 1):
            times.append(end)
            curves.append(rates(start, old, end, now))
            own.append(ratios(now, old))
            mixes.append(shares(now, past[max(0, i - SMOOTHED)][1]))
        chosen = Counter[str]()
        for mix in mixes:
            chosen.update(mix)
        return {"time": times, "rates": {name: [getattr(curve, name) for curve in curves] for name in DRAWN},
                "groups": {name: [at.get(name) for at in own] for name in self.counters.groups.names},
                "pool": {name: [at.get(name, 0.0) if at else None for at in mixes]
                         for name, _ in chosen.most_common(CURVES)}}
