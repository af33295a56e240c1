"""Connections with limits that uvicorn lacks, and the process's shutdown.

Requests must arrive and clients must read within a time. The number of connections is bounded: the one that has been
silent the longest is closed for a new one. After a signal the port stays open while open streams end.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import resource
import signal
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import ConfigError
from ..files import to_json
from .middleware import ServeError
from .options import ServeOptions

IDLE = 30  # seconds that a connection stays open for another request: longer than clients keep it, else both race
LINGER = 1.0  # seconds that a refused client has to read the error
UNSENT = 16 << 10  # bytes that wait for a client, here and in the kernel each, before its stream is paused
TURN = 0.001  # seconds from one read of a large body to the next, of whichever connection
SPARE = 128  # file descriptors beside the connections: weights, logs, refused clients


class Turns:
    """Runs callbacks one at a time, TURN seconds apart."""

    def __init__(self) -> None:
        self._waiting = deque[Callable[[], None]]()
        self._busy = False

    def take(self, loop: asyncio.AbstractEventLoop, what: Callable[[], None]) -> None:
        if self._busy:
            self._waiting.append(what)
            return
        self._busy = True
        loop.call_later(TURN, self._next, loop)
        what()

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        self._busy = False
        if self._waiting:
            self.take(loop, self._waiting.popleft())


class Flow(FlowControl):
    """Flow control that resumes reading in turns: forty uploads at once would keep the event loop from all streams."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, turns: Turns) -> None:
        super().__init__(transport)
        self._loop, self._turns = loop, turns

    def resume_reading(self) -> None:
        if self.read_paused:
            self._turns.take(self._loop, super().resume_reading)


class Connection(H11Protocol):
    """A client's connection."""

    def __init__(self, *args: Any, limits: ServeOptions, turns: Turns, **more: Any) -> None:
        super().__init__(*args, **more)
        self.limits, self.turns = limits, turns
        self.refused = False
        self._receiving: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None
        self._since = self.loop.time()  # when it last had a complete request

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = Flow(transport, self.loop, self.turns)
        transport.set_write_buffer_limits(UNSENT)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            with contextlib.suppress(OSError):  # no TCP
                transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT)
        if len(self.connections) > self.limits.max_connections and not self._make_room():
            self._end(503, "too_many_connections",
                      f"there are {self.limits.max_connections} connections: no more may be open")
            if len(self.connections) > self.limits.max_connections + SPARE // 2:
                transport.abort()
            return
        self._update_timer()

    def _make_room(self) -> bool:
        """Close the connection that has sent no complete request for the longest time. False if there is none."""
        idle = [other for other in self.connections
                if isinstance(other, Connection) and other is not self and not other.refused and other.silent]
        if not idle:
            return False
        oldest = min(idle, key=lambda other: other._since)
        oldest.transport.abort()
        self.connections.discard(oldest)  # uvicorn takes it out a moment later: others may come before
        return True

    @property
    def silent(self) -> bool:
        """Whether no complete request is being answered."""
        return self.transport.is_closing() or self.conn.their_state in (h11.IDLE, h11.SEND_BODY)

    def data_received(self, data: bytes) -> None:
        if self.refused or self.transport.is_closing():
            return
        super().data_received(data)
        if len(data) > HIGH_WATER_LIMIT:  # also of a body that is not read because its request was refused
            self.flow.pause_reading()
            if self.cycle is None or self.cycle.response_complete:  # else the reader of the body continues
                self.flow.resume_reading()
        self._update_timer()

    def _update_timer(self) -> None:
        """Start the timer of an incomplete request; stop that of a complete one."""
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._since = self.loop.time()
            if self._receiving is not None:
                self._receiving.cancel()
                self._receiving = None
        elif self._receiving is None:
            self._receiving = self.loop.call_later(self.limits.receive_timeout, self._too_slow)

    def _too_slow(self) -> None:
        self._end(408, "request_timeout", f"the request was not complete after {self.limits.receive_timeout:g} seconds")

    def leave(self) -> None:
        """End a connection with an incomplete request, at shutdown."""
        if self.conn.their_state is h11.SEND_BODY and not self.refused:
            self._end(503, "shutting_down", "the server is shutting down")

    def _end(self, status: int, code: str, message: str) -> None:
        """Send an error, unless an answer has begun, and close."""
        if self.refused or self.transport.is_closing():
            self.transport.abort()
            return
        self.refused = True
        if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
            kind = "server_error" if status >= 500 else "invalid_request_error"
            body = to_json(ServeError(status, message, kind=kind, code=code).body)
            reason = "Service Unavailable" if status == 503 else "Request Timeout"
            self.transport.write(f"HTTP/1.1 {status} {reason}\r\n"
                                 f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
                                 f"connection: close\r\n\r\n{body}".encode())
            if self.transport.can_write_eof():
                self.transport.write_eof()
        if self.cycle is not None and not self.cycle.response_complete:  # a reader waits for its body
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.loop.call_later(LINGER, self.transport.abort)

    def eof_received(self) -> None:
        if self.refused:
            self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading = self.loop.call_later(self.limits.read_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():  # closing would wait for a client that does not read
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def connection_lost(self, exc: Exception | None) -> None:
        for clock in (self._receiving, self._reading):
            if clock is not None:
                clock.cancel()
        super().connection_lost(exc)


class Process(uvicorn.Server):
    """uvicorn's server. drain(seconds): refuses new requests and waits, that long at most, for open answers."""

    def __init__(self, app: Any, limits: ServeOptions, drain: Callable[[float], Awaitable[None]]) -> None:
        # the answers that drain() has ended get a moment to say so
        connection: Any = functools.partial(Connection, limits=limits, turns=Turns())
        super().__init__(uvicorn.Config(app, http=connection, ws="none", log_level="error", access_log=False,
                                        timeout_keep_alive=IDLE, timeout_graceful_shutdown=5))
        self.limits, self.drain = limits, drain

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Let open answers end at the first signal; end the process at the second."""
        if self.should_exit:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: Any = None) -> None:
        await self.drain(self.limits.shutdown_timeout)  # the port is open meanwhile: new requests get their 503
        for connection in [*self.server_state.connections]:
            if isinstance(connection, Connection):
                connection.leave()
        await super().shutdown(sockets)


def allow_files(connections: int) -> None:
    """Raise the limit of open files for so many connections. Raises ConfigError where the system does not allow it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = connections + 2 * SPARE
    if hard != resource.RLIM_INFINITY and need > hard:
        raise ConfigError(f"max_connections = {connections}: must be at most {hard - 2 * SPARE}, as this process may "
                          f"open {hard} files (ulimit -n)")
    if soft != resource.RLIM_INFINITY and soft < need:
        resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))
