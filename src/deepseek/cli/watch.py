"""`deepseek watch URL`: the dashboard in a terminal; `--files FOLDER`: rules and boards for Prometheus and Grafana."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from ..errors import ConfigError
from ..keys import find_keys
from .parser import Parser

CLEAR = "\x1b[H\x1b[J"


def add_flags(parser: Parser) -> None:
    parser.add_argument("url", nargs="?", metavar="URL", help="of the server, like http://127.0.0.1:8000")
    parser.add_argument("--api_key", help="where the server wants one; a list of processes shows it")
    parser.add_argument("--api_key_file", metavar="FILE", help="the same, the first line of a file; without either the "
                        "variable DEEPSEEK_API_KEY counts")
    parser.add_argument("--interval", type=float, default=2.0, help="seconds between two looks")
    parser.add_argument("--once", action="store_true", help="look once and end")
    parser.add_argument("--files", type=Path, metavar="FOLDER",
                        help="instead: write alerts.yml and prometheus.yml for Prometheus, grafana.json for Grafana")


def run(args: argparse.Namespace) -> None:
    from ..watch.terminal import fetch, view, write_files

    if (args.url is None) == (args.files is None):
        raise ConfigError("watch: must be given either the URL of a server or --files FOLDER")
    if args.files is not None:
        write_files(args.files)
        return
    if not args.interval > 0:
        raise ConfigError(f"interval = {args.interval}: must be positive")
    if args.api_key is not None and args.api_key_file is not None:
        raise ConfigError("--api_key and --api_key_file: must not be given together")
    keys = find_keys(*([] if given is None else [given] for given in (args.api_key, args.api_key_file)))
    key = keys[0] if keys else None
    live = sys.stdout.isatty() and not args.once
    page = view(fetch(args.url, key))
    try:
        while True:
            print(CLEAR + page if live else page, flush=True)
            if args.once:
                return
            time.sleep(args.interval)
            try:
                page = view(fetch(args.url, key))
            except ConfigError as error:  # it may come back
                page = str(error)
    except KeyboardInterrupt:
        return
