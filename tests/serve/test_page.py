"""The chat page in a real browser, over a model whose routing is planted, and the experts that requests ask for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from deepseek.atlas import Atlas, ExpertUsage, NamedGroup
from deepseek.atlas.atlas import Shape
from deepseek.engine import LLM
from deepseek.ids import ExpertSet
from deepseek.serve.middleware import busy
from deepseek.serve.options import ServeOptions
from tests.helpers.planted import plant
from tests.helpers.servers import AUTH, KEY, Running, soon

LAW = "abcdefgh" * 12
HOSTILE = """It **grows** with `x*y` and **<i>hit</i>**, and [so](javascript:alert(1)):
# <script>window.hit = 1</script>

3. one <img src=x onerror="window.hit = 2">
4. two

- a **bold** word
<style>body { display: none }</style>
```html
</code></pre><iframe srcdoc="<script>parent.hit = 3</script>"></iframe>
```
End ** of `it"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    made = plant(tmp_path_factory.mktemp("page"), positions=2048)
    Atlas(Shape.of(made.model.config), [
        NamedGroup(name, "measured", ExpertSet(sorted(made.experts[group]))) for name, group in (
            ("law_expert", "early"), ("code_expert", "middle"), ("text_expert", "late"))]).save(made.folder)
    server = Running(LLM(made.folder, max_num_seqs=8, prefix_cache=False), ServeOptions("planted", api_key=(KEY,)))
    yield server
    server.stop()


def post(server: Running, path: str, body: dict[str, Any], **own: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/{path}", headers=AUTH, timeout=60, json={"model": "planted"} | body | {
        "deepseek": own})


def chunks(answer: str) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in answer.splitlines() if line.startswith("data: {")]


# ---- on the wire -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_experts_come_where_they_are_asked_for(planted: Running, stream: bool) -> None:
    llm, law = planted.llm, {"prompt": LAW, "max_tokens": 3, "temperature": 0, "stream": stream}
    usage = ExpertUsage(llm.model.config)
    llm.generate(LAW, usage=usage, max_tokens=3, temperature=0)
    assert llm.engine.atlas is not None
    want = {name: round(use.weight, 4) for name, use in usage.by_name(llm.engine.atlas).items()}
    assert want["law_expert"] > 0.9

    def last(answer: httpx.Response) -> Any:
        assert answer.status_code == 200, answer.text
        return chunks(answer.text)[-1] if stream else answer.json()

    own = last(post(planted, "completions", law | {"n": 2}, show_experts=True))["deepseek"]["experts"]
    assert own == [want, want] and next(iter(own[0])) == "law_expert"
    assert "deepseek" not in post(planted, "completions", law).text
    both = last(post(planted, "completions", law, show_experts=True, routed=True))["deepseek"]
    assert set(both) == {"experts", "routed"} and sum(both["routed"][0]["1"]) == 4 * usage.tokens
    chat = {"messages": [{"role": "user", "content": LAW}], "max_tokens": 3, "stream": stream}
    counted = chat | ({"stream_options": {"include_usage": True}} if stream else {})
    answer = last(post(planted, "chat/completions", counted, show_experts=True))
    assert answer["usage"]["completion_tokens"] and answer["deepseek"]["experts"][0]["law_expert"] > 0.5
    assert "deepseek" not in post(planted, "chat/completions", chat).text
    answer = last(post(planted, "responses", {"input": LAW, "max_output_tokens": 3, "stream": stream},
                       show_experts=True))
    assert (answer["response"] if stream else answer)["deepseek"]["experts"][0]["law_expert"] > 0.5


def test_experts_of_a_request_beside_one_with_more_of_them(planted: Running) -> None:
    """Their routes lie side by side, padded where a request has fewer experts."""
    def ask(own: dict[str, Any]) -> dict[str, Any]:
        body = {"prompt": LAW, "max_tokens": 40, "temperature": 0}
        answer = post(planted, "completions", body, ignore_eos=True, **own)
        assert answer.status_code == 200, answer.text
        return dict(answer.json().get("deepseek", {}))

    alone = ask({"show_experts": True})
    with ThreadPoolExecutor(3) as pool:
        beside, more, _ = pool.map(ask, [{"show_experts": True}, {"show_experts": True, "experts": {"top_k": 7}},
                                         {"experts": {"mask": ["law_expert"]}}])
    assert beside == alone != more


def test_experts_without_names_are_refused(running: Running) -> None:
    answer = post(running, "completions", {"model": "tiny", "prompt": "fox"}, show_experts=True)
    assert answer.status_code == 400 and "this model has no atlas" in answer.json()["error"]["message"]


# ---- the page --------------------------------------------------------------------------------------------------------


class Opened:
    """A browser's tab with the page, and what went wrong there."""

    def __init__(self, browser: Any, server: Running, **look: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1100, "height": 800}} | look)
        self.page = self.context.new_page()
        self.page.set_default_timeout(90_000)  # milliseconds: the machine may have other work
        self.wrong: list[str] = []
        self.asked: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("dialog", lambda dialog: self.wrong.append(dialog.message))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(f"{server.url}/")

    def log_in(self) -> None:
        self.page.get_by_label("API key").fill(KEY)
        self.page.keyboard.press("Enter")
        self.page.get_by_label("Message").wait_for()

    def force(self, pattern: str) -> None:
        """The model's answers match this regular expression from now on."""
        def forced(route: Any) -> None:
            self.bodies.append(json.loads(route.request.post_data))
            own = self.bodies[-1].get("deepseek", {}) | {"regex": pattern}
            route.continue_(post_data=json.dumps(self.bodies[-1] | {"deepseek": own}))

        self.page.unroute("**/v1/chat/completions")
        self.page.route("**/v1/chat/completions", forced)

    def ask(self, question: str, until: str = "Regenerate") -> None:
        self.page.get_by_label("Message").fill(question)
        self.page.keyboard.press("Enter")
        self.page.get_by_role("button", name=until).wait_for()

    @property
    def answer(self) -> Any:
        return self.page.locator("article").last

    def end(self, server: Running) -> None:
        assert not self.wrong and all(url.startswith((server.url, "data:")) for url in self.asked), self.wrong
        self.context.close()


def test_answers_stream_with_their_experts(planted: Running, browser: Any) -> None:
    tab = Opened(browser, planted)
    page = tab.page
    page.get_by_label("API key").fill("wrong")
    page.keyboard.press("Enter")
    page.get_by_text("The server does not know this key.").wait_for()
    tab.log_in()
    assert page.title() == "planted · chat" and page.locator("h1").inner_text() == "planted"
    assert "law_expert" in page.locator("#empty").inner_text()
    assert page.evaluate("[sessionStorage.getItem('key'), localStorage.length, document.cookie]") == [KEY, 0, ""]

    text = " ".join(f"abc{i}" for i in range(30))
    tab.force(re.escape(text))
    page.evaluate("""() => { window.lengths = new Set();
        new MutationObserver(() => lengths.add(document.querySelector(".text")?.textContent.length)).observe(
            document.querySelector("#log"), { childList: true, subtree: true, characterData: true }); }""")
    with page.expect_response("**/v1/chat/completions") as response:
        tab.ask(LAW)
    assert tab.answer.locator(".text").inner_text() == text == page.locator("#said").inner_text()
    assert page.evaluate("lengths.size") > 3, "the text comes in pieces"
    shares, = chunks(response.value.text())[-1]["deepseek"]["experts"]
    assert tab.answer.locator(".names li").all_inner_texts() == [
        f"{name} {100 * share:.0f} %" for name, share in shares.items() if share >= 0.005]
    assert next(iter(shares)) == "law_expert" and tab.answer.locator(".bar i").count() == len(shares)

    page.get_by_text("Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.25")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "message"
    tab.force("yes")
    tab.ask("And?")
    system, *said = tab.bodies[-1]["messages"]
    assert system == {"role": "system", "content": "Be brief."} and tab.bodies[-1]["temperature"] == 0.25
    assert [own["content"] for own in said] == [LAW, text, "And?"]
    page.get_by_role("button", name="Regenerate").click()
    page.get_by_role("button", name="Regenerate").wait_for()
    assert tab.bodies[-1]["messages"] == tab.bodies[-2]["messages"] and page.locator("article").count() == 2

    tab.force("x{900}")
    aborted = planted.llm.engine.stats.aborted
    tab.ask("Go on", until="Stop")
    soon(page, "document.querySelector('article:last-child .text').textContent.length > 3")
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Stopped.").wait_for()
    page.get_by_role("button", name="New chat").click()
    assert page.locator("article").count() == 0 and page.locator("#empty").is_visible()
    tab.force("<think>Hm</think>y")
    tab.ask("Anew")
    assert tab.answer.locator(".text").inner_text() == "y" and tab.answer.locator(".thought div").text_content() == "Hm"
    assert [own["content"] for own in tab.bodies[-1]["messages"]] == ["Be brief.", "Anew"]
    assert planted.llm.engine.stats.aborted == aborted + 1
    assert page.get_by_role("link", name="Dashboard").get_attribute("href") == "dashboard"
    tab.end(planted)


def test_text_is_data(planted: Running, browser: Any) -> None:
    tab = Opened(browser, planted)
    tab.log_in()
    tab.force(re.escape(HOSTILE))
    question = "<b>me</b> **not** <script>window.hit = 4</script>"
    tab.ask(question)
    text = tab.answer.locator(".text")
    assert question in tab.answer.locator(".question").inner_text() and not tab.answer.locator("b, script").count()
    assert set(text.evaluate("own => [...own.querySelectorAll('*')].map(one => one.localName)")) == {
        "p", "strong", "code", "ol", "li", "ul", "pre"}
    assert text.locator("strong").all_inner_texts() == ["grows", "<i>hit</i>", "bold"]
    assert text.locator("code").all_inner_texts() == ["x*y", HOSTILE.split("```")[1].removeprefix("html\n").strip()]
    assert text.locator("ol").get_attribute("start") == "3" and text.locator("ol li").count() == 2
    assert text.locator(".heading").inner_text() == "<script>window.hit = 1</script>"
    assert "[so](javascript:alert(1))" in text.inner_text() and text.inner_text().endswith("End ** of `it")
    assert tab.page.evaluate("""async () => {
        document.body.append(Object.assign(document.createElement("script"), { textContent: "window.hit = 5" }));
        return [window.hit, await fetch("http://127.0.0.1:9/").then(() => 1, error => error.name)]; }""") == [
            None, "TypeError"]
    tab.end(planted)


def test_light_dark_and_a_phone(planted: Running, browser: Any) -> None:
    shots = []
    for look in ({"color_scheme": "light"}, {"color_scheme": "dark"},
                 {"viewport": {"width": 360, "height": 640}, "is_mobile": True, "has_touch": True}):
        tab = Opened(browser, planted, **look)
        tab.log_in()
        if "viewport" in look:
            tab.force("(?:a\n\n){25}```\n(?:wide){20}")
            tab.page.get_by_label("Message").fill("word" * 50)
            tab.page.get_by_role("button", name="Send").tap()
            tab.page.get_by_role("button", name="Regenerate").wait_for()
            assert tab.page.evaluate("""() => [document.documentElement, document.querySelector("#log")].every(
                own => own.scrollWidth <= own.clientWidth)""")
            assert tab.page.evaluate("""() => { const own = document.querySelector("#log");
                return own.scrollTop > 0 && own.scrollHeight - own.scrollTop - own.clientHeight < 2; }""")
            tab.page.get_by_text("Settings").tap()
            assert tab.page.evaluate("document.documentElement.scrollWidth") == 360
        else:
            shots.append(tab.page.screenshot())
            tab.page.get_by_label("light or dark").click()
            tab.page.get_by_label("Message").focus()
            shots.append(tab.page.screenshot())
        tab.end(planted)
    light, darkened, dark, lightened = shots
    assert len({light, dark}) == 2 and (light, dark) == (lightened, darkened)


def test_errors_are_shown_and_mended(planted: Running, tiny_llm: Callable[..., LLM], browser: Any,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a model without an atlas, whose cache is smaller than its context, and without a key."""
    server = Running(tiny_llm(max_num_seqs=2, cache_tokens=1600), ServeOptions("tiny", shutdown_timeout=0.1))
    try:
        tab = Opened(browser, server)
        page, own = tab.page, server.app.state.server
        page.get_by_label("Message").wait_for()
        assert page.evaluate("document.querySelector('#experts').childElementCount") == 0
        alert = page.get_by_role("alert")
        for change, message in ((("closing", True), "The server takes no requests: the server is shutting down"),
                                (("admit", lambda *_: (_ for _ in ()).throw(busy("9 are waiting"))),
                                 "The server is busy: 9 are waiting")):
            with monkeypatch.context() as patch:
                patch.setattr(own, *change)
                tab.ask("Hello", until="Try again")
                assert alert.last.inner_text() == message
        tab.force("fine")
        tab.ask("Hello")
        assert "deepseek" not in tab.bodies[-1] and tab.bodies[-1]["messages"] == [{"role": "user", "content": "Hello"}]
        assert tab.answer.locator(".text").inner_text() == "fine" and not tab.answer.locator(".names, .wrong").count()
        tab.ask("x" * 20_000, until="Try again")
        assert re.search("model's context .*[.] A new chat begins", alert.last.inner_text())
        tab.force("x{1500}")
        tab.ask("Hello", until="Stop")
        soon(page, "document.querySelector('article:last-child .text').textContent.length > 3")
    finally:
        server.stop()
    page.get_by_role("button", name="Try again").wait_for()
    assert alert.last.inner_text() == "the server is shutting down"
    page.get_by_role("button", name="Try again").click()
    page.get_by_text("The server does not answer.").wait_for()
    tab.end(server)


def test_the_page_needs_no_key_and_names_no_other_host(planted: Running) -> None:
    answer = httpx.get(f"{planted.url}/")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "connect-src 'self'" in policy
    source = (Path(__file__).parents[2] / "src/deepseek/serve/page.html").read_text(encoding="utf-8")
    assert answer.text == source and "innerHTML" not in source and re.findall("https?://(?!www.w3.org)", source) == []
    assert httpx.head(f"{planted.url}/").status_code == 200 and not httpx.head(f"{planted.url}/").content
