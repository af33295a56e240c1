"""A server that listens on a loopback port, in a thread of the test's process."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from typing import Any

from deepseek.engine import LLM
from deepseek.serve.app import create_app
from deepseek.serve.connections import Process
from deepseek.serve.options import ServeOptions

KEY = "sk-test"
AUTH = {"authorization": f"Bearer {KEY}"}


class Running:
    """A server that listens: its LLM, its address, and a way to end it."""

    def __init__(self, llm: LLM, options: ServeOptions) -> None:
        self.llm = llm
        self.app = create_app(llm, options)
        listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.url = "http://{}:{}".format(*listener.getsockname())
        self.server = Process(self.app, options, self.app.state.server.drain)
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve([listener])))
        self.thread.start()

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()


def soon(page: Any, expression: str) -> None:
    """Waits until a browser's page says so."""
    end = time.monotonic() + 60
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(50)
