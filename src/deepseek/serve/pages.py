"""The server's web pages: each is one file with its own style and script, which talks to this server only."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from importlib.resources import files

from fastapi.responses import HTMLResponse

POLICY = ("default-src 'none'; style-src 'sha256-{}'; script-src 'sha256-{}'; connect-src 'self'; img-src data:; "
          "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


def page(room: str, name: str) -> Callable[[], HTMLResponse]:
    """What answers with a page of a room. Its policy forbids every style and script but the page's own."""
    text = (files(f"deepseek.{room}") / name).read_text(encoding="utf-8")
    own = (text.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0].encode() for tag in ("style", "script"))
    policy = POLICY.format(*(base64.b64encode(hashlib.sha256(part).digest()).decode() for part in own))
    return lambda: HTMLResponse(text, headers={"content-security-policy": policy})
