"""What is counted of steps, against a plain loop over tokens; snapshots against their definitions."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from types import SimpleNamespace as Plain
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from deepseek.atlas import Atlas
from deepseek.atlas.atlas import NamedGroup, Shape
from deepseek.config import ModelConfig
from deepseek.ids import ExpertId, ExpertSet
from deepseek.model import Route, RoutingRecord
from deepseek.watch.counters import CLOSE, ServingCounters
from deepseek.watch.metrics import (
    METRICS,
    PREFIX,
    RENAMED,
    Histogram,
    MetricKey,
    delta,
    exposition,
    key,
    quantile,
    values,
)

NAMES = ("code_expert", "law_expert", "odd")


def item(request_id: int, domain: str | None, tokens: int, labels: dict[str, str] | None = None) -> Plain:
    """A request's part of a step."""
    return Plain(request=Plain(request_id=request_id, domain=domain, metric_labels=labels or {}),
                 chunk=Plain(tokens=tokens))


@pytest.fixture(scope="module")
def config(tiny_config: Callable) -> ModelConfig:
    return tiny_config(num_hidden_layers=6, first_k_dense_replace=1, n_routed_experts=8, num_experts_per_tok=2,
                       n_group=1, topk_group=1)


@pytest.fixture(scope="module")
def atlas(config: ModelConfig) -> Atlas:
    """Groups of unlike size, one of them in some layers only; two share an expert."""
    sets = {"code_expert": [(layer, e) for layer in config.moe_layers for e in (0, 1)],
            "law_expert": [(layer, e) for layer in config.moe_layers for e in (2, 3, 4)], "odd": [(2, 7), (3, 0)]}
    return Atlas(Shape.of(config), [
        NamedGroup(name, "measured", ExpertSet(ExpertId(*pair) for pair in own), evidence={"coverage_slots": 0.5})
        for name, own in sets.items()])


def made(draw: Any, config: ModelConfig, steps: int) -> list[tuple[list[Any], RoutingRecord]]:
    """Steps of random requests; some places have no expert."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    requests = [Plain(request_id=i, domain=draw(st.sampled_from([None, "law", "law_expert", "code", "poems"])),
                      metric_labels={"client": draw(st.sampled_from("ab"))}) for i in range(4)]
    out = []
    for _ in range(steps):
        works = [Plain(request=draw(st.sampled_from(requests)), chunk=Plain(tokens=draw(st.integers(1, 5))))
                 for _ in range(draw(st.integers(1, 3)))]
        tokens = sum(work.chunk.tokens for work in works)
        routes = {}
        for layer in config.moe_layers:
            index = torch.rand(tokens, 8, generator=generator).topk(2, 1).indices
            index[torch.rand(tokens, 2, generator=generator) < 0.05] = -1
            routes[layer] = Route(index, torch.rand(tokens, 2, generator=generator), torch.zeros(tokens, 8))
        out.append((works, RoutingRecord(routes)))
    return out


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_counts_against_a_loop(config: ModelConfig, atlas: Atlas, data: Any) -> None:
    counters = ServingCounters(config, atlas)
    slots: dict[tuple[int, int], int] = {}
    wanted: dict[tuple[int, int], int] = {}
    confusion: dict[tuple[str, str], int] = {}
    conflicts = judged = labelled = 0
    of_request: dict[int, list[float]] = {}
    for works, routing in made(data.draw, config, data.draw(st.integers(1, 4))):
        counters.step(works, routing, 0.5)
        if data.draw(st.booleans()):
            counters.now()
        owner = [work.request for work in works for _ in range(work.chunk.tokens)]
        asked = set()
        for t, request in enumerate(owner):
            strength = dict.fromkeys(NAMES, 0.0)
            for row, layer in enumerate(config.moe_layers):
                route = routing.routes[layer]
                for e, weight in zip(route.index_TK[t].tolist(), route.weight_TK[t].tolist(), strict=True):
                    if e < 0:
                        continue
                    slots[row, e] = slots.get((row, e), 0) + 1
                    asked.add((row, e))
                    for name in NAMES:
                        strength[name] += weight * (ExpertId(layer, e) in atlas[name])
            for name in NAMES:
                strength[name] /= len(atlas[name]) / 8
            first, second = sorted(strength.values(), reverse=True)[:2]
            judged, conflicts = judged + 1, conflicts + (first - second < CLOSE * first)
            label = {"law": "law_expert", "law_expert": "law_expert", "code": "code_expert"}.get(request.domain)
            labelled += bool(label)
            if label and first > 0:
                best = max(NAMES, key=lambda name: strength[name])
                confusion[label, best] = confusion.get((label, best), 0) + 1
            mine = of_request.setdefault(request.request_id, [0.0] * 3)
            for i, name in enumerate(NAMES):
                mine[i] += strength[name]
        for place in asked:
            wanted[place] = wanted.get(place, 0) + 1
    snapshot = counters.snapshot()
    for found, expected in ((counters.counts.slots_DLE.sum(0), slots), (counters.wanted_LE, wanted)):
        assert {(row, e): int(n) for row, own in enumerate(found) for e, n in enumerate(own) if n} == expected
    assert {(NAMES[a], NAMES[b]): int(n) for a, own in enumerate(counters.counts.confusion_GG)
            for b, n in enumerate(own) if n} == confusion
    assert (snapshot[key("judged_tokens_total")], snapshot[key("conflict_tokens_total")]) == (judged, conflicts)
    assert int(counters.counts.labelled_G.sum()) == labelled
    assert snapshot[key("distinct_experts_total")] == sum(wanted.values())
    assert int(counters.counts.conflict_GG.sum()) == conflicts
    for number, mine in of_request.items():
        assert counters.strength[number].tolist() == pytest.approx(mine, rel=1e-4)
        counters.finished(number, None, "stop", 0.1, None)
    counters.now()
    assert not counters.strength and counters.snapshot()[key("judged_requests_total")] == len(of_request)


def test_a_reading_by_its_definitions(config: ModelConfig, atlas: Atlas) -> None:
    """All of law's tokens go to two of law's experts; nobody says a word of code."""
    counters = ServingCounters(config, atlas)
    tokens = 30
    index = torch.tensor([[2, 3]]).repeat(tokens, 1)
    routing = RoutingRecord({layer: Route(index, torch.full((tokens, 2), 0.5), torch.zeros(tokens, 8))
                             for layer in config.moe_layers})
    counters.step([item(1, "law", tokens, {"client": "a|b"})],
                  routing, 2.0)
    counters.finished(1, "law", "stop", 0.3, 0.02)
    snapshot = counters.snapshot()
    assert list(counters.groups.bands) == ["1-2", "3-4", "5"]
    assert snapshot[key("slots_total", "1-2")] == 2 * 2 * tokens
    assert snapshot[key("group_slots_total", "law_expert", "1-2")] == 2 * 2 * tokens
    assert snapshot[key("group_expected_slots_total", "law_expert", "1-2")] == 2 * 2 * tokens * 3 / 8
    assert snapshot[key("group_slots_total", "code_expert", "1-2")] == 0
    assert key("group_slots_total", "odd", "5") not in snapshot
    assert key("group_expected_slots_total", "odd", "3-4") in snapshot
    assert snapshot[key("labelled_tokens_total", "law_expert")] == tokens
    assert snapshot[key("correct_tokens_total", "law_expert")] == tokens
    assert snapshot[key("drift", "law_expert")] == pytest.approx(1.0 - 0.5)
    assert key("drift", "code_expert") not in snapshot
    assert snapshot[key("routing_entropy", "5")] == pytest.approx(math.log(2))
    assert snapshot[key("max_vio", "5")] == pytest.approx(30 / (60 / 8) - 1)
    assert snapshot[key("dead_experts", "1-2")] == 12
    assert snapshot[key("requests_total", "law_expert", "stop")] == 1
    assert snapshot[key("slice_tokens_total", "client", "a|b")] == tokens
    assert snapshot[key("conflict_requests_total")] == 0 and snapshot[key("step_seconds_total")] == 2.0
    assert 0 < snapshot[key("watch_seconds_total")] < 1
    later = counters.snapshot(counters.now())  # nothing ran since
    assert key("max_vio", "5") not in later


def test_a_request_may_have_more_experts_than_others(config: ModelConfig, atlas: Atlas) -> None:
    counters, works = ServingCounters(config, atlas), [item(1, "law", 4)]
    for top in (2, 5, 2):
        index = torch.arange(top).repeat(4, 1)
        counters.step(works, RoutingRecord({layer: Route(index, torch.ones(4, top), torch.zeros(4, 8))
                                            for layer in config.moe_layers}), 0.1)
    assert counters.now().slots_DLE.sum() == 4 * 5 * (2 + 5 + 2)


def test_large_numbers_grow_by_one(config: ModelConfig, atlas: Atlas) -> None:
    counters = ServingCounters(config, atlas)
    counters.counts.slots_DLE.fill_(1 << 33)
    before = counters.snapshot()
    counters.counts.slots_DLE[0, 0, 0] += 1
    after = counters.snapshot()
    assert delta(after, before, "group_slots_total", "code_expert", "1-2") == 1
    assert 0 < delta(after, before, "group_expected_slots_total", "code_expert", "1-2") < 1


def test_a_token_without_a_named_group_is_not_right(config: ModelConfig, atlas: Atlas) -> None:
    counters = ServingCounters(config, atlas)
    index = torch.tensor([[5, 6]] * 3)  # in no group
    counters.step([item(1, "code", 3)], RoutingRecord(
        {layer: Route(index, torch.ones(3, 2), torch.zeros(3, 8)) for layer in config.moe_layers}), 0.1)
    snapshot = counters.snapshot()
    assert snapshot[key("labelled_tokens_total", "code_expert")] == 3
    assert snapshot[key("correct_tokens_total", "code_expert")] == 0


def routed(config: ModelConfig, share: float, seed: int, size: int = 4) -> tuple[list[Any], RoutingRecord]:
    """Tokens of `code` and `law` by turns, whose experts are of the first or second routing group with chance `share`,
    else of any; within a group two experts are visited far more than the other two."""
    generator, tokens = torch.Generator().manual_seed(seed), 400
    weights_TE = torch.full((tokens, config.n_routed_experts), (1 - share) / config.n_routed_experts)
    for t in range(tokens):
        first = t // 10 % 2 * size
        weights_TE[t, first : first + size] += share / size * torch.tensor([1.9, 1.7, 0.2, 0.2])
    routes = {layer: Route(torch.multinomial(weights_TE, 2, generator=generator),
                           torch.rand(tokens, 2, generator=generator), torch.zeros(tokens, config.n_routed_experts))
              for layer in config.moe_layers}
    works = [item(i, ("code", "law")[i % 2], 10)
             for i in range(tokens // 10)]
    return works, RoutingRecord(routes)


def built(config: ModelConfig, *more: NamedGroup) -> Atlas:
    """Two routing groups of four are named; text of the other two is nobody's."""
    return Atlas(Shape.of(config), [*Atlas.built_in(config, ["code_expert", "law_expert"]).groups, *more])


@pytest.mark.parametrize("share", [0.9, 0.5, 0.2])
def test_names_of_training_are_judged_as_in_training(tiny_config: Callable, share: float) -> None:
    """The strongest of all routing groups, those without a name too, is the same as deepopt's evaluation has it."""
    config = tiny_config(num_experts_per_tok=2, bos_token_id=None)
    works, routing = routed(config, share, 1)
    counters = ServingCounters(config, built(config))
    counters.step(works, routing, 0.1)
    snapshot = counters.snapshot()
    strength_TG = torch.zeros(400, 4)
    for route in routing.routes.values():
        strength_TG.scatter_add_(1, route.index_TK // 4, route.weight_TK)
    best_T, label_T = strength_TG.argmax(1), torch.arange(400) // 10 % 2
    for g, name in enumerate(("code_expert", "law_expert")):
        assert snapshot[key("correct_tokens_total", name)] == int((best_T == g)[label_T == g].sum())
        assert snapshot[key("labelled_tokens_total", name)] == 200
    top_T2 = strength_TG.topk(2).values
    assert snapshot[key("conflict_tokens_total")] == int((top_T2[:, 0] - top_T2[:, 1] < CLOSE * top_T2[:, 0]).sum())
    assert counters.groups.chance([200, 200]) == 0.25


def test_nothing_that_is_profiled_changes_what_is_said_of_names_of_training(tiny_config: Callable) -> None:
    config = tiny_config(num_experts_per_tok=2)

    def tag(name: str, *experts: int) -> NamedGroup:
        return NamedGroup(name, "measured", ExpertSet(ExpertId(layer, e) for layer in config.moe_layers
                                                      for e in experts))

    def counted(atlas: Atlas) -> tuple[ServingCounters, dict[MetricKey, float]]:
        counters = ServingCounters(config, atlas)
        for seed in range(3):
            counters.step(*routed(config, 0.6, seed), 0.1)
        for number in range(40):
            counters.finished(number, None, "stop", 0.1, None)
        return counters, counters.snapshot()

    plain, before = counted(built(config))
    correct, labelled = (before[key(f"{which}_tokens_total", "code_expert")] for which in ("correct", "labelled"))
    assert 0.5 < correct / labelled < 0.95
    tags = {"nested": tag("hot", 0, 1), "the same": tag("again", 0, 1, 2, 3), "across": tag("both", 0, 4),
            "around": tag("wide", *range(12)), "beside": tag("free", 8, 9), "one": tag("single", 0)}
    for own in (*([one] for one in tags.values()), list(tags.values())):
        counters, after = counted(built(config, *own))
        told = [own for own in before if "slots" not in own.name and "watch" not in own.name]
        assert {own: after[own] for own in told} == {own: before[own] for own in told}
        assert counters.counts.confusion_GG[:2, :2].equal(plain.counts.confusion_GG)
        assert not counters.counts.confusion_GG[:2, 2:].any() and not counters.counts.conflict_GG[2:].any()


def test_a_measured_name_is_held_against_those_of_other_experts(tiny_config: Callable) -> None:
    """`hot` lies within code_expert: of its text, law_expert is a rival and code_expert is not; without names of
    training, a name within another changes nothing of the other one either."""
    config = tiny_config(num_experts_per_tok=2, num_hidden_layers=2)

    def tag(name: str, *experts: int) -> NamedGroup:
        return NamedGroup(name, "measured", ExpertSet(ExpertId(1, e) for e in experts))

    def right(atlas: Atlas, domain: str, *experts: int) -> float:
        counters = ServingCounters(config, atlas)
        index = torch.tensor([experts] * 5)
        counters.step([item(1, domain, 5)], RoutingRecord(
            {1: Route(index, torch.ones(5, 2), torch.zeros(5, 16))}), 0.1)
        return counters.snapshot()[key("correct_tokens_total", domain)] / 5

    atlas = built(config, tag("hot", 0, 1), tag("far", 12, 13))
    assert right(atlas, "hot", 0, 2) == 1.0, "code_expert is stronger by nothing but the same experts"
    assert right(atlas, "hot", 4, 5) == right(atlas, "hot", 2, 3) == 0.0
    assert right(atlas, "hot", 0, 12) == right(atlas, "far", 12, 13) == 1.0
    assert ServingCounters(config, atlas).groups.chance([0, 0, 7, 0]) == pytest.approx(1 / 3)
    measured = Atlas(Shape.of(config), [tag("law", 0, 1, 2, 3), tag("contracts", 0, 1), tag("code", 4, 5)])
    assert right(measured, "law", 0, 1) == right(measured, "contracts", 0, 3) == 1.0
    assert right(measured, "law", 4, 5) == right(measured, "contracts", 4, 5) == 0.0
    counters = ServingCounters(config, measured)
    index = torch.tensor([[0, 1]])
    counters.step([item(1, "law", 1)], RoutingRecord(
        {1: Route(index, torch.ones(1, 2), torch.zeros(1, 16))}), 0.1)
    assert counters.snapshot()[key("conflict_tokens_total")] == 0, "two names of the same experts are in no conflict"


def test_steps_of_a_thread_while_another_reads(config: ModelConfig, atlas: Atlas) -> None:
    counters, over = ServingCounters(config, atlas), threading.Event()

    def read() -> None:
        while not over.is_set():
            counters.snapshot()

    thread = threading.Thread(target=read)
    thread.start()
    index = torch.tensor([[2, 3]])
    routing = RoutingRecord({layer: Route(index, torch.ones(1, 2), torch.zeros(1, 8)) for layer in config.moe_layers})
    for i in range(2000):
        counters.step([item(i, "law", 1)], routing, 0.1)
        counters.finished(i, "law", "stop", 0.1, 0.1)
    over.set()
    thread.join()
    snapshot = counters.snapshot()
    assert snapshot[key("correct_tokens_total", "law_expert")] == snapshot[key("judged_requests_total")] == 2000
    assert snapshot[key("requests_total", "law_expert", "stop")] == 2000 and not counters.strength


def test_domains_of_clients_stay_few(config: ModelConfig, atlas: Atlas) -> None:
    label = ServingCounters(config, atlas).groups.label
    assert [label(name) for name in ("law", "odd", "odd_expert", "math", "medical_expert", "my|own", None)] == [
        "law_expert", "odd", "odd", "math_expert", "medical_expert", "other", "unknown"]


def test_without_atlas_or_experts(tiny_config: Callable) -> None:
    counters = ServingCounters(tiny_config(first_k_dense_replace=3))
    counters.step([item(1, "law", 3)], None, 0.1)
    snapshot = counters.snapshot()
    assert snapshot[key("steps_total")] == 1 and snapshot[key("slice_tokens_total", "domain", "law_expert")] == 3
    assert not any(own.name.startswith(("slots", "max_vio", "group", "distinct")) for own in snapshot)


def test_clients_that_were_seen_last_are_remembered(config: ModelConfig) -> None:
    counters = ServingCounters(config)
    for i in range(1000):
        for client in (str(i), "faithful"):
            counters.step([item(i, "law", 1, {"client": client, "language": "fr"})], None, 0.0)
            counters.now()
    found = values(counters.snapshot(), "slice_tokens_total")
    assert len(found) == 256 + 2 and found["client", "faithful"] == 1000 and found["client", "999"] == 1
    assert found["language", "fr"] == found["domain", "law_expert"] == 2000


def test_exposition_is_what_prometheus_reads() -> None:
    histogram = Histogram("time_to_first_token_seconds")
    for wait in (0.05, 0.5, 0.6, 7.0):
        histogram.add(wait)
    snapshot = {key("steps_total"): 3.0, key("slots_total", "1-9"): 5.0, key("requests_total", 'a"\n\\', "stop"): 1.0,
               key("slice_tokens_total", "client", "x"): 1.0, key("cpu_ratio"): 0.5} | histogram.snapshot()
    families = {family.name: family for family in text_string_to_metric_families(exposition(snapshot).decode())}
    assert PREFIX + "slice_tokens" not in families
    assert families[PREFIX + "requests"].samples[0].labels == {"domain": 'a"\n\\', "reason": "stop"}
    samples = {(s.name, s.labels.get("le")): s.value for s in families[PREFIX + "time_to_first_token_seconds"].samples}
    assert samples[PREFIX + "time_to_first_token_seconds_bucket", "1.0"] == 3
    assert samples[PREFIX + "time_to_first_token_seconds_count", None] == 4
    assert samples[PREFIX + "time_to_first_token_seconds_sum", None] == pytest.approx(8.15)
    assert all(metric.help for metric in METRICS.values())


def test_former_names_are_served_beside_the_new_ones() -> None:
    """For one release: the same samples, and HELP says what to use instead."""
    snapshot: dict[MetricKey, float] = {}
    for metric in METRICS.values():
        if metric.kind == "histogram":
            (histogram := Histogram(metric.name)).add(0.3)
            snapshot |= histogram.snapshot()
        else:
            snapshot[key(metric.name, *metric.labels)] = 7.0
    text = exposition(snapshot).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert len(RENAMED) == 10
    for old, new in RENAMED.items():
        former, current = (families[PREFIX + name.removesuffix("_total")] for name in (old, new))
        assert former.documentation == f"Deprecated: use {PREFIX}{new}"
        assert former.type == current.type and "Deprecated" not in current.documentation
        assert [(s.name.replace(former.name, current.name), s.labels, s.value) for s in former.samples] == [
            (s.name, s.labels, s.value) for s in current.samples]
    assert sum(line.startswith("# HELP") for line in text.splitlines()) == len(RENAMED) + sum(
        metric.exported for metric in METRICS.values())


def test_percentiles_of_a_stretch() -> None:
    histogram = Histogram("request_time_per_output_token_seconds")
    histogram.add(9.0)
    old = histogram.snapshot()
    for i in range(100):
        histogram.add(0.1 + i / 1000)
    now = histogram.snapshot()
    assert quantile(0.5, now, old, "request_time_per_output_token_seconds") == pytest.approx(0.15, abs=0.002)
    assert quantile(0.99, now, now, "request_time_per_output_token_seconds") is None
    beyond = quantile(0.999, histogram.snapshot(), {}, "request_time_per_output_token_seconds")
    assert beyond == 2.5, "the last bound"
    assert delta({key("steps_total"): 3.0}, {key("steps_total"): 10.0}, "steps_total") == 3.0  # began anew
