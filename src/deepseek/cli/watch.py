"""`deepseek watch URL`: the dashboard in a terminal; `deepseek watch RUN`: a run of training; `--files FOLDER`: rules
and boards for Prometheus and Grafana."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ..errors import ConfigError
from ..keys import find_keys
from ..watch.options import TerminalOptions
from .parser import Parser, add_settings, given_settings, make

CLEAR = "\x1b[H\x1b[J"


def add_flags(parser: Parser) -> None:
    parser.add_argument("url", nargs="?", metavar="URL|RUN",
                        help="of the server, like http://127.0.0.1:8000; or the folder of a run of train or tune")
    add_settings(parser, TerminalOptions)
    parser.add_argument("--files", type=Path, metavar="FOLDER",
                        help="instead: write alerts.yml and prometheus.yml for Prometheus, grafana.json for Grafana")


def run(args: argparse.Namespace) -> None:
    if (args.url is None) == (args.files is None):
        raise ConfigError("watch: must be given either the URL of a server, the folder of a run or --files FOLDER")
    if args.files is not None:
        from ..watch.terminal import write_files

        if given := given_settings(args, TerminalOptions):
            raise ConfigError(f"{', '.join(given)}: applies to the URL of a server alone, not to --files")
        write_files(args.files)
        return
    options = make(args, TerminalOptions)
    folder = Path(args.url)
    look = _run(folder, options) if "://" not in args.url and folder.is_dir() else _server(args.url, options)
    live = sys.stdout.isatty() and not options.once
    try:
        page, more = look()
        while True:
            print(CLEAR + page if live else page, flush=True)
            if options.once or not more:
                return
            time.sleep(options.interval)
            try:
                page, more = look()
            except ConfigError as error:  # it may come back
                page = str(error)
    except KeyboardInterrupt:
        return


Look = Callable[[], tuple[str, bool]]  # a page, and whether there may be another


def _server(url: str, options: TerminalOptions) -> Look:
    from ..watch.terminal import fetch, view

    key = next(iter(find_keys(options.api_key, options.api_key_file)), None)
    return lambda: (view(fetch(url, key)), True)


def _run(folder: Path, options: TerminalOptions) -> Look:
    from ..deepopt.show import RunView

    if options.api_key or options.api_key_file:
        raise ConfigError("api_key: applies to the URL of a server alone, not to the folder of a run")
    return RunView(folder).look
