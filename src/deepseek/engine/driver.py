"""The one thread that runs an engine's steps. Callers submit requests and wait for them: `request.done`, `on_token`.

What callers want is queued and done between two steps: the thread takes the engine's lock again at once after a step,
and a caller that waited for the lock could wait long.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from ..errors import RequestError
from .engine import WAIT, Engine
from .request import Request

T = TypeVar("T")
POLL_SECONDS = 1.0  # between looks of a waiting thread: is it still wanted, was it interrupted


class EngineDriver:
    """Steps an engine while requests that were submitted here have not ended. The first one starts the thread."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.closed = engine, False
        self._changed = threading.Condition()
        self._submitted: list[Request] = []
        self._calls: list[tuple[Future[Any], Callable[[], Any]]] = []
        self._resumed = False
        self.thread: threading.Thread | None = None
        self._process = os.getpid()

    @property
    def _running(self) -> bool:
        """Whether the thread takes what is queued; a fork has none of its parent's threads."""
        return self.thread is not None and self._process == os.getpid() and not self.closed

    def submit(self, *requests: Request) -> None:
        """Queue requests. Raises RequestError for one that can never run, and after `close`."""
        for request in requests:
            if not request.checked:
                self.engine.check(request)
        with self._changed:
            if self.closed:
                raise RequestError("this LLM is closed")
            self._submitted += requests
            if not self._running:
                self._process = os.getpid()
                self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
                atexit.register(_close, weakref.ref(self), self.thread)
                self.thread.start()
            self._changed.notify_all()

    def generate(self, *requests: Request) -> None:
        """Run requests to their end; they are aborted if the caller is interrupted. Raises what went wrong."""
        if self._running and threading.current_thread() is self.thread:
            raise RequestError("the callback of a request must not run another: it would wait for itself")
        try:
            self.submit(*requests)
            for request in requests:
                while not request.done.wait(POLL_SECONDS):  # a signal may reach another thread than this one
                    pass
        finally:
            self.abort(*requests)
        for request in requests:
            if request.error is not None:
                raise request.error

    def abort(self, *requests: Request) -> None:
        """Abort those that have not ended; they hold nothing when this returns."""
        if not all(request.done.is_set() for request in requests):
            self.between_steps(partial(self.engine.abort, *requests))

    def between_steps(self, call: Callable[[], T]) -> T:
        """Call a function while no step runs; returns its result, or raises what it raises."""
        result: Future[T] = Future()
        with self._changed:
            if queued := self._running and threading.current_thread() is not self.thread:
                self._calls.append((result, call))
                self._changed.notify_all()
        if queued:
            return result.result()
        with self.engine.lock:
            return call()

    def resume(self, request: Request) -> None:
        """Let a request go on that its reader had paused."""
        with self._changed:
            request.paused, self._resumed = False, True
            self._changed.notify_all()

    def close(self) -> None:
        """Wait for the end of the thread, and abort what has not ended."""
        self.release()
        if self.thread not in (None, threading.current_thread()) and self._process == os.getpid():
            self.thread.join()
        self.engine.abort_all()

    def release(self) -> None:
        """Tell the thread to end. Waits for nothing: the collector of garbage may call this, in any thread."""
        self.closed = True
        if self._changed.acquire(blocking=False):
            self._changed.notify_all()
            self._changed.release()

    def _run(self) -> None:
        pending: list[Request] = []
        while True:
            with self._changed:
                if not (pending or self._submitted or self._calls or self.closed):
                    self._changed.wait(POLL_SECONDS)
                elif self.engine.stalled and not (self._submitted or self._calls or self._resumed or self.closed):
                    self._changed.wait(WAIT)
                submitted, calls, closed = self._submitted, self._calls, self.closed
                self._submitted, self._calls, self._resumed = [], [], False
            while calls:  # none is held while this waits: it may hold the LLM
                self._answer(*calls.pop(0))
            if closed:
                self.engine.abort(*submitted)
                return
            try:
                self.engine.add(*submitted)
                pending = [request for request in (*pending, *submitted) if not request.done.is_set()]
                if pending:
                    self.engine.step()
            except Exception as error:  # a fault of ours: no caller may wait for ever
                self.engine.fail((*pending, *submitted), error)

    def _answer(self, result: Future[T], call: Callable[[], T]) -> None:
        try:
            with self.engine.lock:
                result.set_result(call())
        except BaseException as error:  # its caller raises it
            result.set_exception(error)


def _close(driver: weakref.ref[EngineDriver], thread: threading.Thread) -> None:
    """Before the interpreter goes: no step may be caught in the middle, nor a thread that frees the model's tensors."""
    if (own := driver()) is not None:
        own.close()
    thread.join()
