"""Chat templates are programs of whoever made the checkpoint: whatever they do, it ends, and is an error."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from deepseek import templates
from deepseek.errors import RequestError
from deepseek.templates import render
from deepseek.tokenizer import CHAT_TEMPLATE

NESTED = "{% for i in range(99999) %}{% for j in range(99999) %}" + "{% set x = j %}" + "{% endfor %}{% endfor %}"
DOUBLED = "{% set a = [1] %}" + "{% set a = [a, a] %}" * 60
MACRO = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"


@pytest.fixture(autouse=True)
def _tight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "LIMITS", replace(templates.LIMITS, seconds=0.25, memory=256 << 20))


@pytest.mark.parametrize("bomb", [
    NESTED, DOUBLED + "{{ a }}", MACRO, "{% set x = 10 ** (10 ** 10) %}", "{{ range(99999) | list | string * 9999 }}",
    "{{ 'a' * 10 ** 10 }}", "{{ '%1000000000d' % 1 }}", "{{ '{:>9999999999}'.format(1) }}", "{{ [0] * 10 ** 10 }}",
    "{{ 'a'.ljust(10 ** 10) }}", "{{ 'x' | center(10 ** 10) }}",
    "{% set x = 'a' %}" + "{% set x = x ~ x %}" * 40 + "{{ x }}", "{{ ('a' * 9999).replace('a', 'b' * 999999) }}",
    "{% set x = 'a' %}" + "{% set x = x.join(x ~ x) %}" * 40, "{{ [1] | batch(9 ** 9, 1) | list }}",
    DOUBLED + "{{ a | tojson }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{{ 'a' * (17 * 1024 * 1024) }}", "{{ 'a' * 300000 }}" * 60,
])
def test_a_bomb_ends_as_an_error_that_names_the_limit(bomb: str) -> None:
    with pytest.raises(RequestError, match=r"chat template (exceeds its limits|computes too long|refuses|ended)"):
        render(bomb, {"messages": []})


def test_a_template_too_long_is_refused() -> None:
    with pytest.raises(RequestError, match="300,000 characters: must have 262,144 at most"):
        render(" " * 300_000, {})


def test_after_a_bomb_and_beside_it_others_are_rendered() -> None:
    found: list[str] = []

    def bomb() -> None:
        with pytest.raises(RequestError, match="computes too long"):
            render(NESTED, {})
        found.append(render("{{ a }}", {"a": "é\ud800\ufdd0"}))

    threads = [threading.Thread(target=bomb) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert [render("{{ a }}", {"a": str(i)}) for i in range(20)] == [str(i) for i in range(20)]
    for thread in threads:
        thread.join()
    assert found == ["é\ud800\ufdd0"] * 2


def test_values_must_be_json_and_errors_of_templates_are_told() -> None:
    with pytest.raises(RequestError, match="variables of the chat template must be JSON"):
        render("{{ a }}", {"a": object()})
    with pytest.raises(RequestError, match="refuses the messages: no!"):
        render("{{ raise_exception('no!') }}", {})
    with pytest.raises(RequestError, match="refuses the messages"):
        render("{% for %}", {})
    with pytest.raises(RequestError, match="refuses the messages"):
        render("{{ 1 // 0 }}", {})


def test_our_own_template_needs_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise AssertionError

    monkeypatch.setattr(templates.WORKERS, "take", none)
    values = {"messages": [{"role": "user", "content": "hi"}], "bos_token": "<s>"}
    assert render(CHAT_TEMPLATE, values, trusted=True) == "<s><|User|>hi"
