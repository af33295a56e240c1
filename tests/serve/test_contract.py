"""The OpenAPI document and the server agree: whatever schemathesis makes of it, nothing is an error of ours."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.servers import KEY, Running

schemathesis = pytest.importorskip("schemathesis", reason="needs the test extra (schemathesis)")


@pytest.mark.parametrize("cases", [12, pytest.param(800, marks=pytest.mark.slow)])
def test_no_request_is_an_error_of_ours(running: Running, cases: int) -> None:
    """cases: of each operation that takes something; the long form makes more than 5,000."""
    from hypothesis import HealthCheck, Phase, given, settings

    schema = schemathesis.openapi.from_dict(running.app.openapi())
    made = 0
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(max_examples=cases, deadline=None, database=None, phases=[Phase.generate],
                  suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def ask(case: Any) -> None:
            nonlocal made
            made += 1
            body = case.body
            if isinstance(body, dict) and case.operation.path.endswith("completions"):  # keep answers short
                body["max_tokens"] = min(body["max_tokens"], 2) if isinstance(body.get("max_tokens"), int) else 2
            answer = case.call(base_url=running.url, headers={"authorization": f"Bearer {KEY}"}, timeout=60)
            assert answer.status_code < 500, answer.text

        ask()
    assert made >= cases * 7
