"""A server that is watched: a model whose routing is planted, real requests, a real Prometheus and a real browser."""

from __future__ import annotations

import http.server
import itertools
import json
import random
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from deepseek.atlas import Atlas
from deepseek.atlas.atlas import NamedGroup, Shape
from deepseek.cli import main
from deepseek.engine import LLM
from deepseek.ids import ExpertSet
from deepseek.serve.options import ServeOptions
from deepseek.watch.metrics import total_delta, values
from deepseek.watch.options import WatchOptions
from tests.helpers.planted import LETTERS, plant
from tests.helpers.servers import KEY, Running, soon

GROUPS = {"law": "early", "code": "middle", "text": "late"}
MINUTES = 0.05
EVEN = ("law", "code", "text")
SKEWED = ("law", "text")


class _Hook(http.server.BaseHTTPRequestHandler):
    told: list[dict[str, Any]] = []

    def do_POST(self) -> None:
        self.told.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@dataclass
class Watched:
    running: Running
    hook: list[dict[str, Any]]
    client: httpx.Client
    history: Path
    sent: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, domain: str, user: str = "web", tokens: int = 2) -> dict[str, Any]:
        draw = random.Random(len(self.sent))
        prompt = "".join(draw.choices(LETTERS[GROUPS[domain]], k=150))
        answer = self.client.post("/v1/completions", json={
            "model": "planted", "prompt": prompt, "max_tokens": tokens, "user": user, "deepseek": {"domain": domain}})
        assert answer.status_code == 200, answer.text
        self.sent.append(answer.json())
        return self.sent[-1]

    def drive(self, domains: Sequence[str], until: Callable[[], bool], user: str = "web") -> None:
        """Requests of these domains in turn until something has happened, a while at most."""
        end = time.monotonic() + 90
        for domain in itertools.cycle(domains):
            if until():
                return
            assert time.monotonic() < end, self.state()["alerts"]
            self.ask(domain, user)
            time.sleep(0.03)  # what is waited for takes seconds of the clock: other tests may have the core

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.client.get("/dashboard/state").json()
        return state


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    planted = plant(folder)
    Atlas(Shape.of(planted.model.config), [
        NamedGroup(f"{domain}_expert", "measured", ExpertSet(sorted(planted.experts[name])),
                   evidence={"coverage_slots": 0.9}) for domain, name in GROUPS.items()]).save(planted.folder)
    _Hook.told = []
    hook = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hook)
    threading.Thread(target=hook.serve_forever, daemon=True).start()
    watch = WatchOptions(interval=0.1, alert_minutes=MINUTES, price_per_hour=2.0,
                         alert_webhook=f"http://127.0.0.1:{hook.server_port}/", history=folder / "history.sqlite")
    server = Running(LLM(planted.folder, max_num_seqs=8), ServeOptions("planted", api_key=(KEY,), watch=watch))
    with httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {KEY}"}, timeout=60) as client:
        yield Watched(server, _Hook.told, client, folder / "history.sqlite")
    server.stop()
    hook.shutdown()
    hook.server_close()


def test_a_skewed_workload_trips_the_alert_and_a_healthy_one_does_not(
        watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    began = time.monotonic()
    watched.drive(EVEN, lambda: time.monotonic() - began > 3 * 60 * MINUTES)
    state = watched.state()
    assert not state["alerts"] and not state["past_alerts"]
    assert all(0.7 < group["ratio"] < 2 for group in state["groups"]), state["groups"]
    assert state["accuracy"] > 0.9 and state["groups"][0]["drift"] == pytest.approx(0.1, abs=0.1)

    watched.drive(SKEWED, lambda: bool(watched.running.app.state.server.watch.monitor.alerts.firing), user="batch")
    alert, = watched.state()["alerts"]
    assert (alert["rule"], alert["subject"]) == ("share_low", "code_expert")
    assert alert["value"] < 0.3 and "check the data distribution" in alert["message"]
    assert "client=batch went from" in alert["message"] and "domain=code_expert went from" in alert["message"]
    watched.drive(SKEWED, lambda: bool(watched.hook))
    assert watched.hook[0]["status"] == "firing" and watched.hook[0]["message"].startswith("code_expert has ")
    assert any("code_expert has" in record.message for record in caplog.records if record.name == "deepseek.watch")

    watched.drive(EVEN, lambda: not watched.running.app.state.server.watch.monitor.alerts.firing)
    past = watched.state()["past_alerts"]
    assert [bool(own["begins"]) for own in past if own["rule"] == "share_low"] == [False, True]


def test_metrics_agree_with_what_was_sent(watched: Watched) -> None:
    for _ in range(3):
        watched.ask("law")
    samples = {(s.name, *s.labels.values()): s.value for family in text_string_to_metric_families(
        watched.client.get("/metrics").text) for s in family.samples}
    assert sum(v for k, v in samples.items() if k[0] == "moe_dr_requests_total") == len(watched.sent)
    new = sum(one["usage"]["completion_tokens"] for one in watched.sent)
    prompt = sum(one["usage"]["prompt_tokens"] for one in watched.sent)
    assert samples["moe_dr_tokens_total", "sampled"] == new
    ran = samples["moe_dr_tokens_total", "computed"] + samples["moe_dr_tokens_total", "cached"]
    assert ran == prompt + new - len(watched.sent)  # the last token of each is never run
    slots = sum(v for k, v in samples.items() if k[0] == "moe_dr_slots_total")
    assert slots == 2 * 4 * samples["moe_dr_tokens_total", "computed"]
    assert samples["moe_dr_time_to_first_token_seconds_count",] == len(watched.sent)
    assert samples["moe_dr_process_cpus",] > 0 and samples["moe_dr_price_per_hour",] == 2.0
    assert "web" not in watched.client.get("/metrics").text  # clients have no labels


def test_clients_that_leave_are_counted_and_leave_nothing(watched: Watched) -> None:
    counters = watched.running.app.state.server.watch.counters

    def aborted() -> float:
        return sum(v for (_, reason), v in values(counters.snapshot(), "requests_total").items() if reason == "abort")

    before = aborted()
    for _ in range(3):
        with watched.client.stream("POST", "/v1/completions", json={
                "model": "planted", "prompt": "abc", "max_tokens": 200, "n": 4, "stream": True,
                "deepseek": {"ignore_eos": True}}) as stream:
            next(stream.iter_lines())
    end = time.monotonic() + 20
    while aborted() < before + 12 or counters.strength or not watched.running.llm.engine.idle:
        assert time.monotonic() < end, (aborted() - before, counters.strength)
        time.sleep(0.05)
    assert aborted() == before + 12


def test_who_watches_cannot_harm(watched: Watched, monkeypatch: pytest.MonkeyPatch,
                                 caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: Any) -> None:
        raise OSError("no space left on device")

    monitor = watched.running.app.state.server.watch.monitor
    with monkeypatch.context() as patch:
        patch.setattr(watched.running.app.state.server.watch.counters, "on_step", broken)
        assert watched.ask("law")["choices"][0]["finish_reason"] in ("stop", "length")
    assert "a listener of the engine's steps failed" in caplog.text
    told = []
    with monkeypatch.context() as patch:
        patch.setattr(monitor.alerts, "sinks", [broken, lambda *what: told.append(what)])
        monitor.alerts.notify("an alert", True)
    assert told == [("an alert", True)] and "could not be passed on" in caplog.text


def test_more_experts_for_one_request_do_not_disturb_the_counts(watched: Watched) -> None:
    before = watched.running.app.state.server.watch.counters.snapshot()
    answer = watched.client.post("/v1/completions", json={
        "model": "planted", "prompt": "abcabc", "max_tokens": 3, "deepseek": {"experts": {"top_k": 6}}})
    assert answer.status_code == 200 and watched.client.get("/metrics").status_code == 200
    after = watched.running.app.state.server.watch.counters.snapshot()
    usage = answer.json()["usage"]
    grown = total_delta(after, before, "slots_total")
    assert grown == 2 * 6 * (usage["total_tokens"] - 1)


def test_languages_are_told(watched: Watched) -> None:
    watch = watched.running.app.state.server.watch
    watch.languages.join(60)  # until then every text is "und"
    assert [watch.language_of(text) for text in (
        "How can I get my deposit back from the landlord?", "房东不退押金怎么办，我可以起诉他吗", "hi", "",
        "hello world", "please do")] == ["en", "zh", "und", "und", "und", "und"]


def test_feedback_is_taken_once(watched: Watched) -> None:
    answer = watched.ask("law")["id"]
    assert watched.client.post("/v1/feedback", json={
        "id": answer, "rating": "down", "comment": "wrong statute"}).json() == {
        "object": "feedback", "id": answer, "rating": "down"}
    for body, status, words in (({"id": answer, "rating": "up"}, 409, "rated before"),
                                ({"id": "cmpl-x", "rating": "up"}, 404, "none of the last"),
                                ({"id": answer, "rating": "great"}, 400, "rating"),
                                ({"rating": "up"}, 400, "id")):
        refused = watched.client.post("/v1/feedback", json=body)
        assert refused.status_code == status and words in refused.json()["error"]["message"]
    state = watched.state()
    law, = (own for own in state["business"] if own["domain"] == "law_expert")
    assert law["satisfied"] == 0.0 and state["comments"][0]["comment"] == "wrong statute"
    assert state["figures"]["watch_seconds_total"] < state["figures"]["step_seconds_total"]


def test_tools_and_schemas_are_judged(watched: Watched) -> None:
    def chat(**more: Any) -> Any:
        return watched.client.post("/v1/chat/completions", json={
            "model": "planted", "messages": [{"role": "user", "content": "abcd"}], "seed": 1, "deepseek": {
                "domain": "law"}} | more).json()

    flag = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "boolean"}}}
    assert chat(response_format=flag, max_tokens=50)["choices"][0]["finish_reason"] == "stop"
    assert chat(response_format=flag, max_tokens=1)["choices"][0]["finish_reason"] == "length"
    tool = {"type": "function", "function": {"name": "look", "parameters": {
        "type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"],
        "additionalProperties": False}}}
    assert chat(tools=[tool], tool_choice="required", max_tokens=200)["choices"][0]["finish_reason"] == "tool_calls"
    assert chat(tools=[tool], tool_choice="required", max_tokens=3)["choices"][0]["finish_reason"] == "length"
    text = watched.client.get("/metrics").text
    for outcome in ('schema_answers_total{domain="law_expert",outcome="valid"}',
                    'schema_answers_total{domain="law_expert",outcome="invalid"}',
                    'tool_calls_total{domain="law_expert",outcome="right"}',
                    'tool_calls_total{domain="law_expert",outcome="wrong"}'):
        assert f"moe_dr_{outcome} 1.0" in text, text


def test_only_the_page_and_health_are_open(watched: Watched) -> None:
    for path, status in (("/dashboard", 200), ("/health", 200), ("/metrics", 401), ("/dashboard/state", 401),
                         ("/dashboard/heat", 401), ("/dashboard/series", 401)):
        assert httpx.get(watched.running.url + path, timeout=60).status_code == status, path
    assert watched.client.get("/dashboard/series", params={"minutes": "x"}).status_code == 400


def test_the_heat_map_and_the_curves(watched: Watched) -> None:
    for _ in range(5):
        watched.ask("law")
    heat = watched.client.get("/dashboard/heat").json()
    assert heat["layers"] == [1, 2] and heat["names"] == ["law_expert", "code_expert", "text_expert"]
    assert all(sum(row) == pytest.approx(16, abs=0.1) for row in heat["ratio"])
    law = [e for e, own in enumerate(heat["groups"][0]) if own == [0]]
    assert len(law) == 4 and min(heat["ratio"][0][e] for e in law) > 1
    series = watched.client.get("/dashboard/series", params={"minutes": 5}).json()
    assert len(series["time"]) == len(series["rates"]["tokens"]) == len(series["groups"]["law_expert"])
    assert max(v for v in series["rates"]["new_tokens"] if v is not None) > 0


def test_the_view_in_a_terminal(watched: Watched, capsys: pytest.CaptureFixture[str], tmp_path: Path,
                                monkeypatch: pytest.MonkeyPatch) -> None:
    watched.ask("code")
    assert main(["watch", watched.running.url, "--api_key", KEY, "--once"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("planted   up ") and "code_expert" in out and "new tokens/s" in out and "###" in out
    (tmp_path / "key").write_text(f"{KEY}\n")
    assert main(["watch", watched.running.url, "--api_key_file", str(tmp_path / "key"), "--once"]) == 0
    monkeypatch.setenv("DEEPSEEK_API_KEY", KEY)
    assert main(["watch", watched.running.url, "--once"]) == 0
    for args, words in ((["watch", watched.running.url, "--once"], "answers 401: it needs an API key"),
                        (["watch", "http://127.0.0.1:9", "--once"], "no server of ours answers there"),
                        (["watch", "ftp://x", "--once"], "must begin with http"), (["watch"], "either the URL"),
                        (["watch", "--files", str(tmp_path / "x"), "--once"], "once: applies to the URL of a server")):
        assert main(args) != 0
        assert words in capsys.readouterr().err
    assert main(["watch", "--files", str(tmp_path / "x")]) == 0
    assert {path.name for path in (tmp_path / "x").iterdir()} == {"alerts.yml", "grafana.json", "prometheus.yml"}


# ---- other programs --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("prometheus"), reason="needs prometheus (Debian's package)")
def test_a_real_prometheus_scrapes_it_and_its_alert_fires(watched: Watched, tmp_path: Path) -> None:
    assert main(["watch", "--files", str(tmp_path)]) == 0
    rules = (tmp_path / "alerts.yml").read_text()
    (tmp_path / "alerts.yml").write_text(rules.replace("for: 5m", "for: 1s"))  # the rest as it is
    config = (tmp_path / "prometheus.yml").read_text().replace("15s", "1s").replace(
        "127.0.0.1:8000", watched.running.url.removeprefix("http://"))
    config = config.replace("# authorization:", "authorization:").replace(
        "#   credentials: KEY", f"  credentials: {KEY}")
    (tmp_path / "prometheus.yml").write_text(config)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(["prometheus", f"--config.file={tmp_path}/prometheus.yml",
                                    f"--web.listen-address={address}", f"--storage.tsdb.path={tmp_path}/data"],
                                   stderr=log)

    def ask(path: str) -> Any:
        try:
            return httpx.get(f"http://{address}/api/v1/{path}", timeout=10).json()["data"]
        except (httpx.TransportError, ValueError):  # it is starting
            return {}

    def firing() -> set[tuple[str, str]]:
        return {(alert["labels"]["alertname"], alert["labels"].get("group", "")) for alert in ask("alerts").get(
            "alerts", ()) if alert["state"] == "firing"}

    try:
        watched.drive(EVEN, lambda: any(t["health"] == "up" for t in ask("targets").get("activeTargets", ())))
        group, = ask("rules")["groups"]
        assert len(group["rules"]) == 8 and all(rule["health"] != "err" for rule in group["rules"])
        began = time.monotonic()
        watched.drive(EVEN, lambda: time.monotonic() - began > 1.5)
        assert not firing()
        watched.drive(SKEWED, lambda: bool(firing()))
        assert firing() == {("ExpertShareLow", "code_expert")}
    finally:
        process.terminate()
        process.wait(30)


OUT_OF_SIGHT = """() => [...document.querySelectorAll("td, .tile *, .legend span, main h2, main p")].filter(own => {
    const box = own.getBoundingClientRect(), cut = own.clientWidth && own.scrollWidth > own.clientWidth + 1;
    return own.offsetParent && own.textContent.trim() && (box.right > innerWidth || box.left < 0 || cut); }).map(
        own => own.textContent)"""
SHOWN = """() => [...document.querySelectorAll("main *")].filter(own => own.checkVisibility()).length"""


def test_the_dashboard_on_a_phone(watched: Watched, browser: Any) -> None:
    """Nothing but a log-in before there is a key; then every value within the window, and lines told apart."""
    for domain in EVEN * 2:
        watched.ask(domain)
    context = browser.new_context(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    page = context.new_page()
    page.goto(f"{watched.running.url}/dashboard")
    page.get_by_label("API key").wait_for()
    assert page.title() == "Log in · MoE-DR" and page.evaluate(SHOWN) == 0
    assert page.get_by_role("heading", name="Log in").is_visible() and not page.get_by_label("time shown").is_visible()
    assert page.evaluate("document.activeElement.id") == "secret", "one can type at once"
    button = page.get_by_role("button", name="Open the dashboard")
    button.tap()
    assert page.locator("#wrong").inner_text() == "", "no key is not a wrong key"
    page.get_by_label("API key").fill("wrong")
    button.tap()
    page.get_by_text("The server does not know this key.").wait_for()
    page.get_by_label("API key").fill(KEY)
    button.tap()
    page.wait_for_selector("#groups table")
    assert not page.get_by_label("API key").is_visible() and page.title() == "planted · MoE-DR"
    soon(page, "document.querySelectorAll('#latency path').length == 4")
    soon(page, "document.querySelectorAll('#over path').length == 3")
    assert page.evaluate("document.documentElement.scrollWidth") == 390 and page.evaluate(OUT_OF_SIGHT) == []
    row = page.locator("#groups tbody tr").first
    assert "law" in row.inner_text() and "×" in row.inner_text()
    labels = row.locator("td").evaluate_all("own => own.map(td => getComputedStyle(td, '::before').content)")
    assert labels[1:] == [f'"{name}"' for name in (
        "slots / expected", "share", "layer 1", "layer 2", "accuracy", "drift")]
    lines = {own: page.locator(f"#{own} + .legend > span").evaluate_all(
        "own => own.map(s => [s.textContent, getComputedStyle(s.firstChild).borderTopStyle])") for own in (
            "latency", "over")}
    assert lines["latency"] == [["first, p50", "solid"], ["first, p99", "dashed"], ["each, p50", "solid"],
                                ["each, p99", "dashed"]]
    assert lines["over"] == [["law", "solid"], ["code", "solid"], ["text", "solid"], ["uniform routing", "dashed"]]
    drawn = page.locator("#latency path").evaluate_all("own => own.map(p => !!p.getAttribute('stroke-dasharray'))")
    assert drawn == [False, True, False, True]
    page.evaluate("""() => { document.hidden || (refused = true);  // no newer state comes
        const long = i => "financial_regulation_and_compliance_" + i + "_expert", groups = [0, 1, 2, 3, 4, 5, 6, 7];
        state.groups = groups.map(i => ({ ...state.groups[0], name: long(i), resident: 1, hits: 1 }));
        state.conflict = groups.map(() => groups.map(() => 123456));
        state.confusion = groups.map(a => groups.map(b => a === b ? 9 : 0));
        state.residency = { hits: 1, stall: 1, prefetch_hits: 1, read_bytes: 1e12 };
        state.business = groups.map(i => ({ ...state.business[0], domain: long(i) }));
        state.slices = { client: groups.map(i => ["a-client-with-a-name-without-any-space-at-all-" + i, .1]) };
        state.past_alerts = [{ time: state.time, begins: true, message: long(1).repeat(4) }];
        draw(); }""")
    assert page.evaluate("document.documentElement.scrollWidth") == 390 and page.evaluate(OUT_OF_SIGHT) == []
    context.close()


def test_the_dashboard_in_a_real_browser(watched: Watched, browser: Any) -> None:
    for domain in ("law", "code", "text") * 4:
        watched.ask(domain)
    page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
    wrong: list[str] = []
    asked: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{watched.running.url}/dashboard")
    page.get_by_label("API key").fill("wrong")
    page.keyboard.press("Enter")
    soon(page, "document.getElementById('status').textContent.includes('needs an API key')")
    page.get_by_label("API key").fill(KEY)
    page.keyboard.press("Enter")
    page.wait_for_selector("#groups table")
    assert page.locator("h1").inner_text() == "planted" and not page.locator("#key").is_visible()
    assert page.locator("#groups tbody tr").count() == 3
    assert "new tokens" in page.locator("#tiles").inner_text() and "law" in page.locator("#business").inner_text()
    soon(page, "document.querySelectorAll('#throughput path').length == 2")
    soon(page, """() => {
        const canvas = document.getElementById("heat"), own = canvas.getContext("2d"), seen = new Set();
        const data = own.getImageData(0, 0, canvas.width, canvas.height).data;
        for (let i = 0; i < data.length; i += 4) seen.add(data.slice(i, i + 3).join());
        return seen.size > 20; }""")
    box = page.locator("#heat").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 8)
    assert "layer 1, expert" in page.locator("#tip").inner_text()
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.get_by_label("light or dark").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    page.get_by_label("time shown").select_option("15")
    soon(page, "performance.getEntriesByType('resource').some(e => e.name.endsWith('minutes=15'))")

    watched.drive(SKEWED, lambda: bool(watched.running.app.state.server.watch.monitor.alerts.firing))
    page.wait_for_selector("#alerts.firing")
    assert "code_expert has" in page.locator("#alerts").inner_text()
    for width in (360, 768):
        page.set_viewport_size({"width": width, "height": 800})
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert not wrong and all(url.startswith((watched.running.url, "data:")) for url in asked)
