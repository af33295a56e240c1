"""API keys: which ones count, and what one may look like.

`--api_key` and `--api_key_file` count together; the variable DEEPSEEK_API_KEY counts where neither is given. A key on
the command line is in every list of processes; the other two are not.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from .errors import ConfigError

VARIABLE = "DEEPSEEK_API_KEY"
_LARGEST = 1 << 16  # bytes of a file of keys


def find_keys(given: Sequence[str] = (), files: Sequence[str | Path] = ()) -> list[str]:
    """The keys that count; none where there is neither flag, file nor variable. The variable is taken out of the
    environment, so that no process started from here inherits it.

    Raises ConfigError for a blank key, a file without one, and a key that no client can send.
    """
    variable = os.environ.pop(VARIABLE, None)
    keys = [*given, *(key for file in files for key in read_keys(file))]
    check_keys(keys)
    if given or files or variable is None:
        return keys
    check_keys([variable.strip()], VARIABLE)
    return [variable.strip()]


def read_keys(file: str | Path) -> list[str]:
    """The keys of a file, one a line. Raises ConfigError where it cannot be read or holds none."""
    try:
        with Path(file).expanduser().open("rb") as opened:
            data = opened.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise ConfigError(f"api_key_file = {str(file)!r}: must be {_LARGEST:,} bytes at most")
        lines = data.decode("utf-8").split("\n")
    except OSError as error:
        raise ConfigError(f"api_key_file = {str(file)!r}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"api_key_file = {str(file)!r}: must be text, a key a line") from None
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise ConfigError(f"api_key_file = {str(file)!r}: is blank: must hold a key")
    check_keys(keys, f"api_key_file = {str(file)!r}")
    return keys


def check_keys(keys: Sequence[str], where: str = "api_key") -> None:
    """Raises ConfigError for a key that no client can send, without saying it."""
    for key in keys:
        if not key or not all("!" <= character <= "~" for character in key):
            raise ConfigError(f"{where}: must be visible ASCII characters without spaces, and not be empty"
                              + (f": got one of {len(key)} characters" if key else ""))
