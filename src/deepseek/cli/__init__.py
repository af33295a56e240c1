"""The command line: a module per command, loaded when that command is run, so `--help` is instant."""

from .main import infer_main, main

__all__ = ["infer_main", "main"]
