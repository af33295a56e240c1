"""Reads and checks request bodies: their size in JSON values is bounded before they are parsed.

Parsing holds the interpreter's lock, so the engine and all streams wait for it: 4 MB of empty objects take a second.
Refusing them here takes some milliseconds. Large bodies are parsed in a thread.
"""

from __future__ import annotations

import json
from email.message import Message
from typing import Any, NoReturn, TypeVar

import numpy as np
from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema
from starlette.requests import ClientDisconnect

from .middleware import ServeError, to_serve_error
from .protocol import Body

B = TypeVar("B", bound=Body)
LIMITS = (("objects, lists and members", b"{[:", 1 << 16), ("items", b",", 1 << 19))  # what, its marks, at most
PIECE = 32 << 10  # bytes that are counted at a time
SMALL = 16 << 10  # bytes that are parsed quickly, on the event loop


async def read(http: Request) -> bytes:
    """The bytes of a body. Raises ServeError for an empty one and for other types than JSON: a web page of any origin
    may send text/plain and forms without a preflight request."""
    try:
        raw = await http.body()
    except ClientDisconnect:
        raise ServeError(400, "the body is not whole") from None
    if not raw:
        raise ServeError(400, "the body is empty: must be a JSON object")
    kind = Message()
    kind["content-type"] = http.headers.get("content-type", "")
    if kind.get_content_maintype() != "application" or not (
            (subtype := kind.get_content_subtype()) == "json" or subtype.endswith("+json")):
        raise ServeError(400, f"content-type = {http.headers.get('content-type')!r:.80}: must be application/json")
    return raw


def parse(raw: bytes, form: type[B]) -> B:
    """A body as a checked request. Raises ServeError naming the first thing that is wrong."""
    counts = count_marks(raw, *(marks for _, marks, _ in LIMITS)) if len(raw) > min(most for *_, most in LIMITS) else ()
    for (what, _, most), count in zip(LIMITS, counts, strict=False):
        if count > most:
            raise ServeError(400, f"the body has more than {most:,} {what}: must have that many at most")
    try:
        given = json.loads(raw.decode("utf-8-sig"), parse_constant=_no_json)
        return form.model_validate(given)
    except (RecursionError, ValidationError) as error:
        raise to_serve_error(error) from None
    except ValueError as error:  # no UTF-8, no JSON, or an integer of thousands of digits
        raise ServeError(400, f"the body is not JSON: {error}") from None


def _no_json(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON")


def count_marks(raw: bytes, *groups: bytes) -> list[int]:
    """How many bytes of each group there are outside of strings. In pieces, so that other threads go on."""
    text = np.frombuffer(raw.replace(rb"\\", b"").replace(rb"\"", b"") if b"\\" in raw else raw, np.uint8)
    wanted = np.zeros((len(groups), 256), bool)
    for row, marks in zip(wanted, groups, strict=True):
        row[list(marks)] = True
    counts, quotes = np.zeros(len(groups), int), np.uint8(0)
    for start in range(0, len(text), PIECE):
        piece = text[start : start + PIECE]
        quotes_N = np.add.accumulate(piece == ord('"'), dtype=np.uint8) + quotes
        counts += [np.count_nonzero(row[piece] > (quotes_N & 1)) for row in wanted]
        quotes = quotes_N[-1]
    return counts.tolist()


# ---- OpenAPI ---------------------------------------------------------------------------------------------------------

_forms: set[type[BaseModel]] = set()
_REFERENCE = "#/components/schemas/{model}"


def takes(form: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI entry of a route with this body."""
    _forms.add(form)
    schema = {"$ref": _REFERENCE.format(model=form.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def describe(app: FastAPI) -> None:
    """Add the bodies of the routes to the app's OpenAPI document."""
    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            forms = sorted(_forms, key=lambda form: form.__name__)
            _, own = models_json_schema([(form, "validation") for form in forms], ref_template=_REFERENCE)
            app.openapi_schema.setdefault("components", {}).setdefault("schemas", {}).update(own["$defs"])
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
