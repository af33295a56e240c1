"""What stands before the routes: errors in OpenAI's shape, keys, body limits, request ids, the log."""

from __future__ import annotations

import hmac
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/health", "/dashboard")  # for load balancers and browsers, which send no key; the page asks for one
log = logging.getLogger("deepseek.serve")


class ServeError(Exception):
    """An answer that is an error. kind, param, code: as in OpenAI's errors."""

    def __init__(self, status: int, message: str, *, kind: str = "invalid_request_error", param: str | None = None,
                 code: str | None = None, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Guard:
    """ASGI around the routes: whoever has no key, or sends too much, gets no further.

    keys: empty lets everybody in. body: bytes of a request at most. told: of the status of a refusal. Every answer
    carries `x-request-id`, and one line of JSON about it goes to the log: no text of prompts or answers.
    """

    def __init__(self, app: App, keys: Sequence[str], body: int, told: Callable[[int], None]) -> None:
        self.app, self.keys, self.body, self.told = app, [key.encode() for key in keys], body, told

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        name, began, status, taken = f"req_{secrets.token_hex(12)}", time.perf_counter(), 500, 0

        async def answer(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if taken > self.body and status == 500:  # what is said of a body that was cut off is beside the point
                return
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name.encode())]
            await send(message)

        async def limited() -> MutableMapping[str, Any]:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            return {"type": "http.disconnect"} if taken > self.body else message

        scope.setdefault("state", {})["request_id"] = name
        try:
            headers = dict(scope["headers"])
            if self.keys and scope["path"] not in OPEN and not self._known(headers.get(b"authorization", b"")):
                raise ServeError(401, "the API key is missing or wrong: must be sent as `Authorization: Bearer KEY`",
                                 code="invalid_api_key", headers={"www-authenticate": "Bearer"})
            length = headers.get(b"content-length", b"0")
            if length.isdigit() and int(length) > self.body:
                raise ServeError(413, f"the body has {int(length):,} bytes: at most {self.body:,}",
                                 code="body_too_large")
            await self.app(scope, limited, answer)
            if taken > self.body:
                taken = 0
                raise ServeError(413, f"the body is larger than {self.body:,} bytes", code="body_too_large")
        except ServeError as error:
            await refuse(error, answer)
        finally:
            if status >= 400:
                self.told(status)
            log.info(json.dumps({"request_id": name, "method": scope["method"], "path": scope["path"], "status": status,
                                 "seconds": round(time.perf_counter() - began, 4), "bytes": taken}))

    def _known(self, header: bytes) -> bool:
        scheme, _, key = header.partition(b" ")
        return scheme.lower() == b"bearer" and any(
            hmac.compare_digest(key.strip(), own) for own in self.keys)


async def refuse(error: ServeError, send: Send) -> None:
    body = json.dumps(error.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
               *((key.encode(), value.encode()) for key, value in error.headers.items())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
