"""Options of a server. Imports neither torch nor FastAPI: flags are made of it."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ..errors import ConfigError
from ..keys import check_keys, read_keys
from ..settings import COUNT, POSITIVE, Option, Settings, between
from ..watch.options import WatchOptions

HOST_CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._"


@dataclass(frozen=True)
class ServeOptions(Settings):
    """How an LLM is served, and watched. api_key becomes all keys, those of the files too; none admits everybody. port,
    log, and the limits of connections are the process's, not the app's. Raises ConfigError naming option, value and
    rule."""

    name: Annotated[str, Option("what clients call the model; the folder's name if not given")] = ""
    host: Annotated[str, Option("address to listen on; 0.0.0.0 is all of this machine's", (
        "must be a host's name or address", lambda v: isinstance(v, str) and bool(v.strip())))] = "127.0.0.1"
    port: Annotated[int, Option("0 takes a free one", between(0, 65535))] = 8000
    api_key: Annotated[tuple[str, ...], Option(
        "clients must send it; may be given several times; a list of processes shows it", each=True,
        secret=True)] = ()
    api_key_file: Annotated[tuple[str | Path, ...], Option(
        "the same, a key a line; without either the variable DEEPSEEK_API_KEY counts", metavar="FILE", each=True)] = ()
    cors_origin: Annotated[tuple[str, ...], Option(
        "web pages of this origin may ask, such as https://example.org; * is all", metavar="ORIGIN", each=True)] = ()
    allowed_host: Annotated[tuple[str, ...], Option(
        "a further name by which clients may reach the server (Host header); may be given several times",
        metavar="NAME", each=True)] = ()
    max_waiting: Annotated[int, Option("requests that may queue; beyond is status 429", COUNT)] = 256
    max_body: Annotated[int, Option("bytes of a request at most", COUNT)] = 4 << 20
    timeout: Annotated[float, Option("seconds that an answer may take, from arrival", POSITIVE)] = 600.0
    max_connections: Annotated[int, Option(
        "open connections at most; idle and half-sent ones make room, then further ones get status 503", COUNT)] = 1000
    receive_timeout: Annotated[float, Option("seconds in which a request must arrive", POSITIVE)] = 60.0
    read_timeout: Annotated[float, Option("seconds in which a client must read", POSITIVE)] = 60.0
    shutdown_timeout: Annotated[float, Option("seconds that open answers still have", POSITIVE)] = 30.0
    classifier: Annotated[str | Path | None, Option(
        "classifier.npz of `deepseek data`: finds the domain of requests that name none and have no keywords",
        metavar="FILE")] = None
    pool_on_request: Annotated[bool, Option(
        "the pool answers only the requests that ask for it (deepseek.pool); else all that name the base")] = False
    log: Annotated[bool, Option("log every request as a line of JSON, without its text")] = False
    log_texts: Annotated[bool, Option(
        "the same with the prompt (of a chat, its last message) and the answer")] = False
    watch: WatchOptions = WatchOptions()  # noqa: RUF009

    def __post_init__(self) -> None:
        super().__post_init__()
        keys = [*self.api_key, *(key for file in self.api_key_file for key in read_keys(file))]
        check_keys(keys)
        object.__setattr__(self, "api_key", tuple(keys))
        object.__setattr__(self, "api_key_file", ())
        object.__setattr__(self, "allowed_host", tuple(map(check_host, self.allowed_host)))


def host_name(header: str) -> str | None:
    """The host of a Host header in lower case, without port, brackets and final dot; None if it is malformed."""
    name, bracket, port = header.strip().rpartition("]") if header.strip().startswith("[") else ("", "", "")
    if bracket:
        address = address_of(name[1:])
        good = address is not None and ":" in name and (not port or (port[0] == ":" and port[1:].isdecimal()))
        return str(address) if good else None
    name, colon, port = header.strip().partition(":")
    if not name or (colon and not (port.isascii() and port.isdecimal())):
        return None
    return name.lower().removesuffix(".") or None


def address_of(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def check_host(name: str) -> str:
    """A host name in the form that Host headers are compared with. Raises ConfigError for a malformed one."""
    address = address_of(name.strip("[]"))
    if address is not None:
        return str(address)
    if host_name(name) is None or not set(name) <= set(HOST_CHARACTERS):
        raise ConfigError(f"allowed_host = {name!r}: must be a host's name or address, without scheme, port and path")
    return name.lower().removesuffix(".")
