"""Who takes part in a run that is merged every so many steps, agreed on in a store that none of them owns.

Nothing but the store connects the ranks: one that dies or hangs takes no connection of another with it. Of a round r:

    rR/about/RANK, rR/part/RANK/0..   what a rank has to say and to give; `about` comes last, so the rest is there
    rR/verdict                        whose parts are merged, and who is in the next round: the first to propose it
                                      decides, so all merge the same parts
    join/RANK                         a rank that is not in the round wants to be; the next verdict takes it in
    admit/RANK                        the round from which it takes part; state/R/.. is what it begins with
    gone/RANK                         the process that started the rank has seen it end

A rank waits for the others until `grace` seconds after it has come to the end itself. One that is late finds a verdict
without it and joins again. Values are at most 8 MB in torch's store, so larger ones are divided.
"""

from __future__ import annotations

import contextlib
import json
import platform
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ..errors import ConfigError, RankError
from ..files import to_json
from .ranks import Ranks

PIECE = 4 << 20
POLL = 0.1  # seconds between two looks


@dataclass(frozen=True)
class Verdict:
    """Of a round: whose parts are merged; who is in the next one, of whom `joining` need the state; how many steps each
    of them takes in it; `begin`: the first micro-batch of the next round's."""

    merged: list[int]
    members: list[int]
    joining: list[int]
    steps: dict[int, int]
    begin: int

    def to_json(self) -> str:
        return to_json(asdict(self))

    @classmethod
    def of(cls, text: bytes) -> Verdict:
        value = json.loads(text)
        return cls(**value | {"steps": {int(rank): steps for rank, steps in value["steps"].items()}})


@dataclass
class Members:
    """This rank among those that the store knows. grace: seconds."""

    store: dist.Store
    rank: int
    size: int
    grace: float
    sent: int = 0  # bytes
    received: int = 0
    mine: list[str] = field(default_factory=list)  # keys that this rank has set, to be deleted later

    @classmethod
    def at(cls, address: str, rank: int, size: int, grace: float) -> Members:
        """address: HOST:PORT of a store."""
        host, _, port = address.rpartition(":")
        try:
            store = dist.TCPStore(host, int(port), None, False, timedelta(seconds=grace), wait_for_workers=False)
        except (RuntimeError, ValueError) as error:
            raise RankError(f"rank {rank}: no store answers at {address} ({str(error).splitlines()[0]:.100})") from None
        store.delete_key(f"gone/{rank}")
        return cls(store, rank, size, grace)

    # ---- values of any size --------------------------------------------------------------------------------------

    def put(self, key: str, value: bytes) -> None:
        """The pieces first, their number last."""
        count = max(1, -(-len(value) // PIECE))
        for number in range(count):
            self._set(f"{key}/{number}", value[number * PIECE : (number + 1) * PIECE])
        self._set(key, str(count).encode())

    def get(self, key: str) -> bytes:
        """Of a key that is there, or will be within `grace`."""
        self._await([key], self.grace)
        count = int(self.store.get(key))
        value = b"".join(self.store.get(f"{key}/{number}") for number in range(count))
        self.received += len(value)
        return value

    def there(self, key: str) -> bool:
        with self._named():
            return self.store.check([key])

    def forget(self, prefix: str) -> None:
        """Delete what this rank has set under a prefix, once no other rank can want it."""
        with self._named():
            for key in (old := [key for key in self.mine if key.startswith(prefix)]):
                self.store.delete_key(key)
        self.mine = [key for key in self.mine if key not in old]

    def _set(self, key: str, value: bytes) -> None:
        with self._named():
            self.store.set(key, value)  # type: ignore[arg-type]  # bytes are taken, whatever the stub says
        self.mine.append(key)
        self.sent += len(value)

    def prepared(self, key: str) -> None:
        """Wait, however long it takes, for what another rank prepares. Raises RankError where one has ended with an
        error."""
        with self._named():
            while not self.store.check([key]):
                for rank in range(self.size):
                    if self.store.check([f"gone/{rank}"]) and int(self.store.get(f"gone/{rank}")) >= 0:
                        raise RankError(f"rank {self.rank}: rank {rank} has ended before there was data to train on")
                time.sleep(POLL)

    def agree(self, terms: Mapping[str, Any]) -> None:
        """Raises ConfigError naming what another rank, the first that came, has otherwise."""
        mine = json.loads(to_json(terms))
        with self._named():
            first, theirs = json.loads(self.store.compare_set("terms", "", to_json([self.rank, mine])))
        for name, value in mine.items():
            if value != theirs.get(name):
                raise ConfigError(f"{name} = {value!r:.200}: must be the same on all ranks; rank {first} has "
                                  f"{theirs.get(name)!r:.200}")

    # ---- rounds --------------------------------------------------------------------------------------------------

    def finish(self, number: int, about: Mapping[str, Any], part: bytes) -> None:
        """Say that this rank is at the end of a round."""
        self.put(f"r{number}/part/{self.rank}", part)
        self.put(f"r{number}/about/{self.rank}", to_json(about).encode())

    def wait(self, number: int, members: Sequence[int], grace: float | None = None) -> list[int]:
        """Those who are at the end of a round: all members, or all that are not gone, or those that are when the grace
        is over. One that asks to join is gone: what it had of the round is lost."""
        began, grace = time.monotonic(), self.grace if grace is None else grace
        missing = set(members)
        with self._named():
            while missing:
                missing = {rank for rank in missing if not self.store.check([f"r{number}/about/{rank}"])}
                gone = {rank for rank in missing if self.store.check([f"gone/{rank}"])
                        or self.store.check([f"join/{rank}"])}
                left = grace - (time.monotonic() - began)
                if missing == gone or left <= 0 or self.store.check([f"r{number}/verdict"]):
                    break
                time.sleep(min(POLL, left))
        return [rank for rank in members if rank not in missing]

    def decide(self, number: int, verdict: Verdict) -> Verdict:
        """Propose a verdict; returns the one that was proposed first."""
        with self._named():
            return Verdict.of(self.store.compare_set(f"r{number}/verdict", "", verdict.to_json()))

    def about(self, number: int, rank: int) -> dict[str, Any]:
        return json.loads(self.get(f"r{number}/about/{rank}"))

    def part(self, number: int, rank: int) -> bytes:
        return self.get(f"r{number}/part/{rank}")

    # ---- joining -------------------------------------------------------------------------------------------------

    def asking(self, members: Collection[int]) -> list[int]:
        """Those who want to join."""
        with self._named():
            return [rank for rank in range(self.size) if rank not in members and self.store.check([f"join/{rank}"])]

    def admit(self, rank: int, number: int, state: bytes) -> None:
        """Let a rank take part from a round on, with this state."""
        self.put(f"state/{rank}", state)
        self._set(f"admit/{rank}", str(number).encode())

    def join(self, patience: float) -> tuple[int, bytes]:
        """Ask to take part; returns from which round on, and the state to begin with. Raises RankError where
        no rank admits it within `patience` seconds."""
        for key in (f"admit/{self.rank}", f"state/{self.rank}"):
            self.store.delete_key(key)
        self._set(f"join/{self.rank}", b"1")
        self._await([f"admit/{self.rank}"], patience)
        self.forget(f"join/{self.rank}")
        return int(self.store.get(f"admit/{self.rank}")), self.get(f"state/{self.rank}")

    # ---- waits ---------------------------------------------------------------------------------------------------

    def _await(self, keys: list[str], seconds: float) -> None:
        began = time.monotonic()
        with self._named():
            while not self.store.check(keys):
                if (left := seconds - (time.monotonic() - began)) <= 0:
                    raise RankError(f"rank {self.rank}: no rank has set {', '.join(keys)} within {seconds:g} s; the "
                                    "ranks that should have are gone or hang")
                time.sleep(min(POLL, left))

    def _named(self) -> _Named:
        return _Named(self.rank)


class Solo(Ranks):
    """A rank whose steps are its own. leads: it lets others in, and writes log and checkpoints. apart: every rank has a
    folder of its own, and writes there."""

    def __init__(self, members: Members, local_rank: int, *, apart: bool = False) -> None:
        super().__init__()
        self.members, self.number, self.local_rank, self.apart = members, members.rank, local_rank, apart
        self.leads, self.waits = True, 0

    @property
    def first(self) -> bool:
        return self.leads or self.apart

    @contextlib.contextmanager
    def first_here(self) -> Iterator[bool]:
        key = f"prepared/{platform.node()}/{self.waits}"
        self.waits += 1
        if self.apart:
            yield True
        elif self.local_rank == 0 and not self.members.there("r-1/verdict"):
            yield True
            self.members.put(key, b"")
        else:
            self.members.prepared(key)
            yield False


class _Named:
    """Turns errors of the store into one that says what it means."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, dist.DistNetworkError):
            raise RankError(f"rank {self.rank}: the store does not answer: the process that holds it has ended, or the "
                            f"network is down ({str(error).splitlines()[0]:.100})") from None


def pieces(payload: bytes, sizes: Sequence[int]) -> Iterator[bytes]:
    """A value cut into parts of these sizes."""
    begin = 0
    for size in sizes:
        yield payload[begin : begin + size]
        begin += size
    assert begin == len(payload), "a part of another length than agreed"
