"""`deepseek serve`: its flags, and the process around the app."""

from __future__ import annotations

import argparse
import gc
import logging
import socket
import sys
from dataclasses import replace
from pathlib import Path

from ..domain import DomainClassifier
from ..errors import ConfigError
from ..keys import find_keys
from ..serve.options import ServeOptions
from ..watch.options import WatchOptions
from .common import ModelOptions, add_engine_flags, make_llm, named_adapters
from .parser import Parser, add_settings, make

SHOWN = 20  # names in the first line
SWITCH = 2e-4  # seconds that a thread may keep the interpreter from others


def add_flags(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a checkpoint folder or a hub id")
    parser.add_config()
    add_settings(parser, ServeOptions, {
        "network": "host port api_key api_key_file cors_origin allowed_host name",
        "limits": "max_waiting max_body timeout max_connections receive_timeout read_timeout shutdown_timeout",
        "routing": "pool_on_request",
        "monitoring": "classifier log log_texts"})
    add_settings(parser, WatchOptions, "monitoring")
    add_engine_flags(parser)


def run(args: argparse.Namespace) -> None:
    options = make(args, ServeOptions, watch=make(args, WatchOptions))
    options = replace(options, name=options.name or Path(args.model).resolve().name,
                      api_key=tuple(find_keys(options.api_key)))
    if options.name in named_adapters(make(args, ModelOptions).adapter)[1]:
        raise ConfigError(f"adapter {options.name}: is what the base is called: must have another name")
    if options.pool_on_request and args.pool is None:
        raise ConfigError("pool_on_request: --pool must be given")
    # what cannot be is said before a large model is loaded
    from ..watch.history import History

    History(options.watch.history).close()
    if options.classifier is not None:
        DomainClassifier.load(options.classifier)
    from ..serve.connections import Process, allow_files

    allow_files(options.max_connections)
    listener = _listen(options.host, options.port)
    from ..serve.app import create_app

    llm = make_llm(args)
    level = logging.INFO if options.log or options.log_texts else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    app = create_app(llm, options)
    address = "http://{}:{}".format(*listener.getsockname()[:2])
    names = app.state.server.models[1:]
    beside = f" with {', '.join(names[:SHOWN])}{', …' if len(names) > SHOWN else ''}" if names else ""
    admits = "" if options.api_key else ", open to anyone who can reach it: no API key"
    print(f"serving {options.name}{beside} on {address}/v1{admits}\n"
          f"chat: {address}/   dashboard: {address}/dashboard", flush=True)
    _give_way()
    try:
        Process(app, options, app.state.server.drain).run(sockets=[listener])
    finally:
        gc.unfreeze()  # what is frozen is not freed at the end either: nanobind would report leaks of the kernels


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
