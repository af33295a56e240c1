"""`deepseek serve`: its flags, and the process around the app."""

from __future__ import annotations

import argparse
import gc
import logging
import socket
import sys
from pathlib import Path

from ..domain import DomainClassifier
from ..errors import ConfigError
from ..keys import find_keys
from ..serve.middleware import check_host
from .common import add_device_flags, add_engine_flags, make_llm, named_adapters
from .parser import Parser

SWITCH = 2e-4  # seconds that a thread may keep the interpreter from others


def add_flags(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a checkpoint folder or a hub id")
    network = parser.group("network")
    network.add_argument("--host", default="127.0.0.1", help="address to listen on; the default is this machine alone")
    network.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    network.add_argument("--api_key", action="append", default=[], help="clients must send it; may be given several "
                         "times; a list of processes shows it")
    network.add_argument("--api_key_file", action="append", default=[], metavar="FILE", help="the same, a key a line; "
                         "without either the variable DEEPSEEK_API_KEY counts")
    network.add_argument("--cors_origin", action="append", default=[], metavar="ORIGIN",
                         help="web pages of this origin may ask, such as https://example.org; * is all")
    network.add_argument("--allowed_host", action="append", default=[], metavar="NAME", help="a further name by which "
                         "clients may reach the server (Host header); may be given several times")
    network.add_argument("--name", help="what clients call the model; the folder's name")
    limits = parser.group("limits")
    limits.add_argument("--max_waiting", type=int, default=256, help="requests that may queue; beyond is status 429")
    limits.add_argument("--max_body", type=int, default=4 << 20, help="bytes of a request at most")
    limits.add_argument("--timeout", type=float, default=600.0, help="seconds that an answer may take, from arrival")
    limits.add_argument("--max_connections", type=int, default=1000, help="open connections at most; idle and half-"
                        "sent ones make room, then further ones get status 503")
    limits.add_argument("--receive_timeout", type=float, default=60.0, help="seconds in which a request must arrive")
    limits.add_argument("--read_timeout", type=float, default=60.0, help="seconds in which a client must read")
    limits.add_argument("--shutdown_timeout", type=float, default=30.0, help="seconds that open answers still have")
    watch = parser.group("monitoring")
    watch.add_argument("--classifier", type=Path, metavar="FILE", help="classifier.npz of `deepseek data`: says what "
                       "requests are about that name no domain and have no keywords")
    watch.add_argument("--history", type=Path, help="SQLite file for readings, alerts and feedback; none keeps them "
                       "in memory")
    watch.add_argument("--history_days", type=float, default=30.0, help="how long it keeps them")
    watch.add_argument("--alert_minutes", type=float, default=10.0, help="the window of alerts and shares")
    watch.add_argument("--alert_webhook", metavar="URL", help="URL to which alerts are sent by POST, as JSON")
    watch.add_argument("--price_per_hour", type=float, help="of this machine: gives the cost of 10^8 tokens")
    watch.add_argument("--log", action="store_true", help="a line of JSON for every request, without its text")
    watch.add_argument("--log_texts", action="store_true",
                       help="and one with its prompt (of a chat, the last message) and its answer")
    add_engine_flags(parser)
    add_device_flags(parser)


def run(args: argparse.Namespace) -> None:
    for name in ("max_waiting", "max_body", "timeout", "max_connections", "receive_timeout", "read_timeout",
                 "shutdown_timeout"):
        if not 0 < getattr(args, name) < float("inf"):
            raise ConfigError(f"{name} = {getattr(args, name)}: must be positive and finite")
    keys = find_keys(args.api_key, args.api_key_file)
    hosts = tuple(check_host(name) for name in args.allowed_host)
    from ..watch.history import History
    from ..watch.monitor import WatchOptions

    options = WatchOptions(**{name: getattr(args, name) for name in (
        "alert_minutes", "alert_webhook", "history", "history_days", "price_per_hour")})
    History(options.history).close()  # what cannot be is said before a large model is loaded
    classifier = None if args.classifier is None else DomainClassifier.load(args.classifier)
    from ..serve.connections import ConnectionLimits, Process, allow_files

    allow_files(args.max_connections)
    listener = _listen(args.host, args.port)
    from ..serve.app import create_app
    from ..serve.service import ServeOptions

    name = args.name or Path(args.model).resolve().name
    if name in named_adapters(args.adapter)[1]:
        raise ConfigError(f"adapter {name}: is what the base is called: must have another name")
    llm = make_llm(args)
    llm.classifier = classifier
    level = logging.INFO if args.log or args.log_texts else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    app = create_app(llm, ServeOptions(name, tuple(keys), args.max_waiting, args.max_body, args.timeout,
                                       args.log_texts, options, tuple(args.cors_origin), args.host, hosts))
    address = "http://{}:{}".format(*listener.getsockname()[:2])
    beside = f" with {', '.join(llm.adapters)}" if llm.adapters else ""
    print(f"serving {name}{beside} on {address}/v1" + ("" if keys else ", open to anyone who can reach it: no API key")
          + f"\ndashboard: {address}/dashboard", flush=True)
    limits = ConnectionLimits(args.max_connections, args.receive_timeout, args.read_timeout, args.shutdown_timeout)
    _give_way()
    Process(app, limits, app.state.server.drain).run(sockets=[listener])


def _give_way() -> None:
    """Let the engine's steps and open streams go on while another thread works on a large request.

    A step gives the interpreter's lock back hundreds of times, and at Python's 5 ms waits that long for it each time.
    What has been loaded stays for good, so the garbage collector, which holds everybody up, need not look at it (a
    tenth of a second).
    """
    sys.setswitchinterval(SWITCH)
    gc.collect()
    gc.freeze()


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), backlog=1024)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"host = {host!r}, port = {port}: cannot listen there: {reason}") from None
