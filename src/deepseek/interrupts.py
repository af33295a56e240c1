"""Ctrl-C and SIGTERM: the first signal lets what must be whole be finished, the second leaves at once.

`handled` turns both signals into Stopped, a KeyboardInterrupt. Inside `held` a signal waits until the block is done: a
training step, the writing of a checkpoint. `kept` says what a stop leaves behind. Handlers of the host program and
signals that are ignored (nohup, a job in the background) are left alone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end; `number` is the signal's. Its notes say what is kept."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class _State:
    def __init__(self) -> None:
        self.active = self.hard = False
        self.number: int | None = None  # of the signal that came
        self.held: list[str] = []  # what is being finished, the innermost last
        self.kept: list[str | Callable[[], str]] = []  # what a stop leaves, the innermost last
        self.waits = False  # the signal came inside `held` and is still to be raised

    def on_signal(self, number: int, _: FrameType | None) -> None:
        if self.number is not None:
            if self.hard:
                _leave(number)
            self.waits = False
            raise Stopped(number)
        self.number = number
        if not self.held:
            raise Stopped(number)
        self.waits = True
        _say(f"{signal.Signals(number).name}: {self.held[0]} first; a second one leaves at once")


_state = _State()


@contextlib.contextmanager
def handled(*, hard: bool = False) -> Iterator[None]:
    """Raise Stopped on SIGINT and SIGTERM meanwhile. Inside another `handled`, or in a thread that is not the main one,
    it does nothing. hard: a second signal ends the process, with status 128 + its number, instead of raising."""
    if _state.active or threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: handler for number in SIGNALS if (handler := signal.getsignal(number)) in usual}
    _state.number, _state.waits = None, False
    _state.active, _state.hard = True, hard
    try:
        for number in before:
            signal.signal(number, _state.on_signal)
        with _watched(before) if hard else contextlib.nullcontext():
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _state.active = False


@contextlib.contextmanager
def _watched(numbers: Collection[int]) -> Iterator[None]:
    """Let a thread end the process at the second signal: the main one may be in a long call that is not Python's."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        seen = 0
        with os.fdopen(reader, "rb", buffering=0) as file:
            while came := file.read(1):
                seen += came[0] in numbers
                if seen == 2:
                    _leave(came[0])

    threading.Thread(target=watch, name="signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)


@contextlib.contextmanager
def held(finished: str) -> Iterator[None]:
    """Let a signal wait until the block is done, then raise Stopped. finished: what the message says, such as "step 3
    is finished and saved"."""
    _state.held.append(finished)
    try:
        yield
    finally:
        _state.held.pop()
    if _state.waits and not _state.held:
        _state.waits = False
        assert _state.number is not None
        raise Stopped(_state.number)


def came() -> bool:
    """Whether a signal waits for `held` to end."""
    return _state.waits


@contextlib.contextmanager
def kept(text: str | Callable[[], str]) -> Iterator[None]:
    """Note on a KeyboardInterrupt what it leaves behind; what is noted further inside counts."""
    _state.kept.append(text)
    try:
        yield
    except KeyboardInterrupt as error:
        if not getattr(error, "__notes__", None):
            error.add_note(text if isinstance(text, str) else text())
        raise
    finally:
        _state.kept.pop()


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # print could be interrupted inside itself
        os.write(2, f"\n{text}\n".encode())


def _leave(number: int) -> None:
    with contextlib.suppress(Exception):
        _say("".join(text if isinstance(text, str) else text() for text in _state.kept[-1:]))
    if (multiprocessing := sys.modules.get("multiprocessing")) is not None:
        for child in multiprocessing.active_children():
            child.kill()
    os._exit(128 + number)
