"""Options of monitoring. Imports no torch: flags are made of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from ..errors import ConfigError
from ..settings import NOT_NEGATIVE, POSITIVE, Option, Rule, Settings, is_number


def _up_to(most: float) -> Rule:
    return f"must be above 0 and at most {most}", lambda v: is_number(v) and 0 < v <= most


def _is_address(value: Any) -> bool:
    try:
        parts = urlsplit(value)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except (ValueError, TypeError, AttributeError):  # a port that is none, no text
        return False


@dataclass(frozen=True)
class WatchOptions(Settings):
    """How a server is watched. Raises ConfigError naming option, value and rule."""

    interval: Annotated[float, Option("seconds between two snapshots", _up_to(3600))] = 5.0
    alert_minutes: Annotated[float, Option("minutes that alerts and shares look back", _up_to(120))] = 10.0
    alert_webhook: Annotated[str | None, Option("URL to which alerts are sent by POST, as JSON", (
        "must be an address that begins with http:// or https://", _is_address), "URL")] = None
    history: Annotated[str | Path | None, Option(
        "SQLite file for snapshots, alerts and feedback; none keeps them in memory", metavar="FILE")] = None
    history_days: Annotated[float, Option("days that the history keeps", _up_to(3650))] = 30.0
    price_per_hour: Annotated[float | None, Option(
        "price of this machine, for the cost of 10^8 tokens", NOT_NEGATIVE)] = None


@dataclass(frozen=True)
class TerminalOptions(Settings):
    """How `deepseek watch` shows a server or a run."""

    api_key: Annotated[tuple[str, ...], Option(
        "where the server wants one; a list of processes shows it", each=True, secret=True)] = ()
    api_key_file: Annotated[tuple[str | Path, ...], Option(
        "the same, the first line of a file; without either the variable DEEPSEEK_API_KEY counts", metavar="FILE",
        each=True)] = ()
    interval: Annotated[float, Option("seconds between two updates", POSITIVE)] = 2.0
    once: Annotated[bool, Option("print the state once and exit")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.api_key) + len(self.api_key_file) > 1:
            raise ConfigError("api_key and api_key_file: must be one of them at most, given once")
