"""`deepseek watch URL`: the dashboard in a terminal; `--files FOLDER`: rules and boards for Prometheus and Grafana."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from ..errors import ConfigError
from ..keys import find_keys
from ..watch.options import TerminalOptions
from .parser import Parser, add_settings, given_settings, make

CLEAR = "\x1b[H\x1b[J"


def add_flags(parser: Parser) -> None:
    parser.add_argument("url", nargs="?", metavar="URL", help="of the server, like http://127.0.0.1:8000")
    add_settings(parser, TerminalOptions)
    parser.add_argument("--files", type=Path, metavar="FOLDER",
                        help="instead: write alerts.yml and prometheus.yml for Prometheus, grafana.json for Grafana")


def run(args: argparse.Namespace) -> None:
    from ..watch.terminal import fetch, view, write_files

    if (args.url is None) == (args.files is None):
        raise ConfigError("watch: must be given either the URL of a server or --files FOLDER")
    if args.files is not None:
        if given := given_settings(args, TerminalOptions):
            raise ConfigError(f"{', '.join(given)}: applies to the URL of a server alone, not to --files")
        write_files(args.files)
        return
    options = make(args, TerminalOptions)
    key = next(iter(find_keys(options.api_key, options.api_key_file)), None)
    live = sys.stdout.isatty() and not options.once
    page = view(fetch(args.url, key))
    try:
        while True:
            print(CLEAR + page if live else page, flush=True)
            if options.once:
                return
            time.sleep(options.interval)
            try:
                page = view(fetch(args.url, key))
            except ConfigError as error:  # it may come back
                page = str(error)
    except KeyboardInterrupt:
        return
