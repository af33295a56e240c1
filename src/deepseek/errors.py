"""What can go wrong, and who should act.

    MoEDRError
    ├── ConfigError      (ValueError)         a configuration is impossible: names key, rule and value
    ├── CheckpointError  (ValueError)         a weight file is missing, truncated, altered or of another shape
    ├── DataError        (ValueError)         an input text or record cannot be read: names the file
    ├── NotFoundError    (FileNotFoundError)  a name is neither a preset, a path nor reachable on the hub
    └── RequestError     (ValueError)         a prompt or a sampling parameter is out of range
        └── LeftOutError                      a chat template does not show what an assistant's turn says

Users see one line of these; `assert` is kept for our own invariants.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MoEDRError(Exception):
    """Base of every error that is meant for the user."""


class ConfigError(MoEDRError, ValueError):
    """An impossible configuration value or an unknown key."""


class CheckpointError(MoEDRError, ValueError):
    """A checkpoint file is missing, truncated, altered, or does not fit the model."""


class DataError(MoEDRError, ValueError):
    """An input file or record cannot be used."""


class NotFoundError(MoEDRError, FileNotFoundError):
    """A model name or path leads nowhere."""


class RequestError(MoEDRError, ValueError):
    """A prompt or sampling parameter is out of range."""


class LeftOutError(RequestError):
    """A chat template does not show something that a turn says."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the known name that is spelled most like `name`, else nothing."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {close[0]}?" if close else ""


def printable(text: str) -> str:
    """`text` with control characters, which would reach the terminal, spelled out."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shown(value: object, most: int = 60) -> str:
    """A value from a file as an error cites it: its repr, at most so long, whatever it is."""
    try:
        return f"{value!r:.{most}}"
    except ValueError:
        return "a number of thousands of digits"
    except RecursionError:
        return "a value that is nested too deeply"
