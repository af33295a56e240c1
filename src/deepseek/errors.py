"""The exceptions of the package.

    MoEDRError
    ├── ConfigError      (ValueError)         a configuration is impossible: names key, rule and value
    ├── CheckpointError  (ValueError)         a weight file is missing, truncated, altered or of another shape
    ├── DataError        (ValueError)         an input text or record cannot be read: names the file
    ├── RankError        (RuntimeError)       a process of a distributed run does not answer
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

    status = 2  # of a command that it ends


class ConfigError(MoEDRError, ValueError):
    """An impossible configuration value or an unknown key."""


class CheckpointError(MoEDRError, ValueError):
    """A checkpoint file is missing, truncated, altered, or does not fit the model."""


class DataError(MoEDRError, ValueError):
    """An input file or record cannot be used."""


class NotFoundError(MoEDRError, FileNotFoundError):
    """A model name or path does not exist."""


class RankError(MoEDRError, RuntimeError):
    """A process of a distributed run has ended or does not answer: the message names it."""

    status = 75  # the same command may go on (EX_TEMPFAIL of sysexits.h)


class RequestError(MoEDRError, ValueError):
    """A prompt or sampling parameter is out of range."""


class LeftOutError(RequestError):
    """A chat template leaves out part of a message."""


def nearest(name: str, known: Iterable[str]) -> str:
    """End of an error message: `; did you mean X?` for the closest known name, else ""."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {close[0]}?" if close else ""


def printable(text: str) -> str:
    """`text` with control characters escaped, so that they do not reach the terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shown(value: object, most: int = 60) -> str:
    """Repr of a value from a file for an error message, at most `most` characters long."""
    try:
        return f"{value!r:.{most}}"
    except ValueError:
        return "a number of thousands of digits"
    except RecursionError:
        return "a value that is nested too deeply"
