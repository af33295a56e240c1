"""ASGI middleware: API keys, Host headers, body limits, request ids, the log, and errors in OpenAI's shape."""

from __future__ import annotations

import hmac
import logging
import math
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from ..errors import RequestError
from ..files import to_json
from .options import address_of, host_name
from .protocol import complaint

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

ANY = ("0.0.0.0", "::")  # a server that listens there is reached under every address of its machine
OPEN = ("/", "/health", "/dashboard")  # for load balancers and browsers, which send no key; the page asks for one
log = logging.getLogger("deepseek.serve")


class ServeError(Exception):
    """An error response. kind, param, code: as in OpenAI's errors."""

    def __init__(self, status: int, message: str, *, kind: str = "invalid_request_error", param: str | None = None,
                 code: str | None = None, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def to_serve_error(error: Exception) -> ServeError:
    """The response to any error."""
    if isinstance(error, ServeError):
        return error
    if isinstance(error, HTTPException):
        return ServeError(error.status_code, str(error.detail))
    if isinstance(error, ValidationError | RequestValidationError):
        where, message = complaint(error.errors())
        return ServeError(400, message, param=where or None)
    if isinstance(error, RecursionError):
        return ServeError(400, "the body is nested too deeply")
    if isinstance(error, RequestError):
        return ServeError(400, str(error))
    return ServeError(500, str(error), kind="server_error")


class Guard:
    """Refuses requests without a key, from a wrong host, or too large; gives each an id and a log line.

    keys, hosts: as ServeOptions has checked them. keys: none admits everybody. body: bytes of a request at most.
    on_refused: called with the status of a refusal. bound: the address that the server listens on. hosts: further names
    that a Host header may have. Host headers are checked where there is no key, since a web page could point a name of
    its own here (DNS rebinding), and where hosts are given. requests: at most so many at a time, from arrival on;
    together they may have 16 times `body` bytes. Every answer carries `x-request-id`, and a line of JSON goes to the
    log, without the text of prompts and answers.
    """

    def __init__(self, app: App, keys: Sequence[str], body: int, on_refused: Callable[[int], None],
                 hosts: Sequence[str] = (), bound: str = "127.0.0.1", requests: int | None = None) -> None:
        self.app, self.keys, self.body, self.on_refused = app, [key.encode() for key in keys], body, on_refused
        self.requests, self.bytes = requests or math.inf, 16 * body
        self.open = self.held = 0  # requests with a body under way, and their bytes
        self.hosts = frozenset((*hosts, bound.lower()))
        self.checks_hosts = not keys or bool(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        name, began, status, taken = f"req_{secrets.token_hex(12)}", time.perf_counter(), 500, 0
        claimed, counted = 0, False
        cut: ServeError | None = None  # why the rest of the body is not read

        async def answer(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if cut is not None and status == 500:  # an error about a body that was cut off would mislead
                return
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name.encode())]
            await send(message)

        async def limited() -> MutableMapping[str, Any]:
            nonlocal taken, claimed, cut
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > claimed:  # sent in chunks, without a length
                self.held += taken - claimed
                claimed = taken
                if taken > self.body:
                    cut = ServeError(413, f"the body is larger than {self.body:,} bytes", code="body_too_large")
                elif self.held > self.bytes:
                    cut = busy(f"the requests under way have more than {self.bytes:,} bytes")
            return message if cut is None else {"type": "http.disconnect"}

        scope.setdefault("state", {})["request_id"] = name
        scope["state"]["arrived"] = time.monotonic()
        try:
            length = self._admit(scope)
            if scope["method"] == "POST":
                self.open, counted, claimed = self.open + 1, True, length
                self.held += claimed
            await self.app(scope, limited, answer)
            if cut is not None:
                refusal, cut = cut, None
                raise refusal
        except ServeError as error:
            await error.response(scope, receive, answer)
        finally:
            self.open -= counted
            self.held -= claimed
            if status >= 400:
                self.on_refused(status)
            log.info(to_json({"request_id": name, "method": scope["method"], "path": scope["path"], "status": status,
                                 "seconds": round(time.perf_counter() - began, 4), "bytes": taken}))

    def _admit(self, scope: Scope) -> int:
        """The length that a request's header states. Raises ServeError for one that is refused unread."""
        headers = dict(scope["headers"])
        if self.checks_hosts and not self.is_allowed_host(host := headers.get(b"host", b"").decode("latin-1")):
            raise ServeError(403, f"host = {host!r:.200}: must be a name of this machine; --allowed_host gives "
                             "further ones", code="host_not_allowed")
        if self.keys and scope["path"] not in OPEN and not self._has_key(headers.get(b"authorization", b"")):
            raise ServeError(401, "the API key is missing or wrong: must be sent as `Authorization: Bearer KEY`",
                             code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        stated = headers.get(b"content-length", b"0")
        if not stated.isdigit() or len(stated) > 20:  # h11 lets no other through; servers differ
            raise ServeError(400, f"content-length = {stated!r:.40}: must be a number of bytes")
        if (length := int(stated)) > self.body:
            raise ServeError(413, f"the body has {length:,} bytes: at most {self.body:,}", code="body_too_large")
        if scope["method"] == "POST" and self.open >= self.requests:
            raise busy(f"{self.open} requests are under way: {self.requests} may")
        if scope["method"] == "POST" and self.held + length > self.bytes:
            raise busy(f"the requests under way have {self.held:,} bytes: {self.bytes:,} may be held")
        return length

    def is_allowed_host(self, header: str) -> bool:
        name = host_name(header)
        if name is None:
            return False
        if name in self.hosts or name == "localhost":
            return True
        address = address_of(name)
        # an address is no name in DNS, so it cannot be pointed elsewhere
        return address is not None and (address.is_loopback or not self.hosts.isdisjoint(ANY))

    def _has_key(self, header: bytes) -> bool:
        scheme, _, key = header.partition(b" ")
        return scheme.lower() == b"bearer" and any(
            hmac.compare_digest(key.strip(), own) for own in self.keys)


def busy(message: str) -> ServeError:
    return ServeError(429, message, kind="rate_limit_error", code="queue_full", headers={"retry-after": "1"})
