"""The processes of a run in step: each takes its part of every global batch, and all hold the same weights.

    torchrun --nproc-per-node 2 -m deepseek train ...        gloo on CPU, NCCL on GPU

A global batch is `accumulation` micro-batches, whatever the number of ranks; they are the unit that is divided. So one,
two or four ranks take the same step, to rounding: a sum over ranks adds in another order.

A rank that dies or hangs ends the others' step: every wait has a time-out, and the error names the rank, by what each
last said of itself in the store (`at`). The launcher, or torchrun, then starts all of them again, from the last
checkpoint.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigError, RankError

T = TypeVar("T")
Group = dist.ProcessGroup
BUCKET = 1 << 22  # values of a fused sum: 16 MB


class Ranks:
    """This process among `size`. Without others every method does nothing, or returns what it is given."""

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, timeout: float = 0.0) -> None:
        self.rank, self.size, self.local_rank, self.timeout = rank, size, local_rank, timeout
        self.number = rank  # among all ranks, whether they are in step or not
        self.doing = ""
        self.sent = 0  # bytes of payload that this rank has sent

    @classmethod
    def of_environment(cls, device: str, timeout: float) -> Ranks:
        """The ranks that the launcher or torchrun started, or this process alone. timeout: seconds of any wait."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
        if device == "cuda":
            torch.cuda.set_device(local % torch.cuda.device_count())
        if not dist.is_initialized():
            dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl",
                                    timeout=timedelta(seconds=timeout))
        return cls(rank, size, local, timeout)

    @property
    def first(self) -> bool:
        """Whether this rank writes logs and checkpoints."""
        return self.rank == 0

    @property
    def local_first(self) -> bool:
        """Whether this rank prepares the files of its machine."""
        return self.local_rank == 0

    def part(self, count: int, shares: Sequence[int] | None = None) -> range:
        """Which of `count` micro-batches this rank takes: as even as can be, or as many as `shares` gives each rank."""
        if self.size == 1:
            return range(count)
        shares = even(count, self.size) if shares is None else shares
        assert len(shares) == self.size and sum(shares) == count
        begin = sum(shares[: self.rank])
        return range(begin, begin + shares[self.rank])

    # ---- waits, each with a time-out -----------------------------------------------------------------------------

    def at(self, what: str) -> None:
        """Say what this rank does now; the error of another that waits for it repeats it."""
        self.doing = what
        if self.size > 1:
            with self.named():
                _store().set(f"at/{self.rank}", what)

    def groups(self, size: int) -> tuple[Group, Group]:
        """The `size` consecutive ranks of which this is one, and those that have its place in theirs."""
        wait = timedelta(seconds=self.timeout)
        with self.named():
            rows = [dist.new_group(range(first, first + size), wait) for first in range(0, self.size, size)]
            columns = [dist.new_group(range(first, self.size, size), wait) for first in range(size)]
        return rows[self.rank // size], columns[self.rank % size]

    def sum_(self, tensors: Sequence[Tensor], group: Group | None = None) -> None:
        """Replace each tensor by its sum over the ranks, or those of a group, in fused buckets; BF16 sums in FP32."""
        if self.size == 1:
            return
        with self.named():
            pending = []
            for bucket in buckets(tensors):
                flat = fused(bucket)
                pending.append((bucket, flat, dist.all_reduce(flat, group=group, async_op=True)))
                self.sent += ring_bytes(flat.nbytes, dist.get_world_size(group))
            for bucket, flat, work in pending:
                work.wait()
                for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                    tensor.copy_(part.view_as(tensor))

    def exchange(self, payloads: Sequence[Tensor]) -> list[Tensor]:
        """Send payloads[r] to rank r; returns what each rank sent to this one. Payloads to one rank have one size."""
        if self.size == 1:
            return list(payloads)
        sizes = [len(payload) for payload in payloads]
        own = sizes[self.rank]
        out = torch.empty(own * self.size, dtype=torch.uint8, device=payloads[0].device)
        with self.named():
            dist.all_to_all_single(out, torch.cat(list(payloads)), [own] * self.size, sizes)
        self.sent += sum(sizes) - own
        return list(out.split(own))

    def all(self, payload: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """The payloads of all ranks; `sizes` are theirs."""
        if self.size == 1:
            return [payload]
        out = [torch.empty(max(sizes), dtype=torch.uint8, device=payload.device) for _ in sizes]
        with self.named():
            dist.all_gather(out, torch.nn.functional.pad(payload, (0, max(sizes) - len(payload))))
        self.sent += max(sizes) * (self.size - 1)
        return [part[:size] for part, size in zip(out, sizes, strict=True)]

    def swap(self, rows: Sequence[Tensor], sent: Sequence[int], came: Sequence[int], group: Group) -> list[Tensor]:
        """Send rows of several tensors together, sent[r] of them to the rank r of the group, in their order; returns
        the rows that came, came[r] from rank r."""
        coded = torch.cat([part.contiguous().view(torch.uint8) for part in rows], 1)
        out = coded.new_empty(sum(came), coded.shape[1])
        with self.named():
            dist.all_to_all_single(out, coded, [*came], [*sent], group)
        self.sent += (sum(sent) - sent[dist.get_rank(group)]) * coded.shape[1]
        return [part.contiguous().view(like.dtype) for part, like in zip(
            out.split([like.shape[1] * like.itemsize for like in rows], 1), rows, strict=True)]

    def send(self, value: Any, rank: int) -> None:
        """Send a rank what it receives with `receive`: a value in the memory of the CPU."""
        with self.named():
            dist.send_object_list([value], rank, device=torch.device("cpu"))

    def receive(self, rank: int) -> Any:
        found = [None]
        with self.named():
            dist.recv_object_list(found, rank, device=torch.device("cpu"))
        return found[0]

    def copy_from_first(self, tensors: Sequence[Tensor], group: Group | None = None) -> None:
        """Give every rank, or those of a group, the values of the first of them."""
        if self.size == 1:
            return
        with self.named():
            for bucket in buckets(tensors):
                flat = torch.cat([tensor.flatten() for tensor in bucket])
                dist.broadcast(flat, group=group, group_src=0)
                for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                    tensor.copy_(part.view_as(tensor))

    def gather(self, value: T) -> list[T]:
        """A small value of each rank, in their order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with self.named():
            dist.all_gather_object(found, value)
        return found

    def from_first(self, value: T) -> T:
        return self.gather(value if self.first else None)[0]  # type: ignore[return-value]

    def same(self, name: str, value: Any) -> None:
        """Raises ConfigError where the ranks do not have the same value."""
        found = self.gather(value)
        for rank, other in enumerate(found):
            if other != found[0]:
                raise ConfigError(f"{name}: must be the same on all ranks; rank 0 has {found[0]!r:.100}, rank {rank} "
                                  f"{other!r:.100}")

    @contextlib.contextmanager
    def first_here(self) -> Iterator[bool]:
        """The first rank of each machine enters at once, the others when it has left."""
        if self.size == 1:
            yield True
            return
        if self.local_first:
            yield True
            self.gather(None)
        else:
            self.gather(None)
            yield False

    @contextlib.contextmanager
    def named(self, words: Sequence[str] = ("",)) -> Iterator[None]:
        """Let errors of torch.distributed name the rank that is missing. words: one of them stands in such an error,
        where others may come too."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, RankError) or not any(word in str(error).lower() for word in words):
                raise
            raise RankError(f"rank {self.rank}, {self.doing or 'at the start'}: {self._who()} "
                            f"(time-out {self.timeout:g} s; {str(error).splitlines()[0]:.150})") from error

    def _who(self) -> str:
        """What the others said last."""
        said = {}
        for rank in range(self.size):
            try:
                said[rank] = _store().get(f"at/{rank}").decode() if _store().check([f"at/{rank}"]) else "nothing yet"
            except RuntimeError:
                return "the store does not answer: the process that holds it has ended"
        late = {rank: what for rank, what in said.items() if rank != self.rank and what != self.doing}
        if not late:
            return "another rank has ended in the same step"
        return "no answer from " + ", ".join(f"rank {rank}, last heard of {what or 'at the start'}"
                                             for rank, what in late.items())


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def even(count: int, size: int) -> list[int]:
    """`count` divided as evenly as can be, the larger parts first."""
    return [count // size + (rank < count % size) for rank in range(size)]


def buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype in their order, about BUCKET values together."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (bucket[0].dtype != tensor.dtype or sum(t.numel() for t in bucket) + tensor.numel() > BUCKET):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def fused(bucket: Sequence[Tensor]) -> Tensor:
    """What is summed of tensors of one dtype: their values one after another, BF16 in FP32."""
    flat = torch.cat([tensor.flatten() for tensor in bucket])
    return flat.float() if flat.dtype == torch.bfloat16 else flat


def ring_bytes(size: int, ranks: int) -> int:
    """Bytes that each rank sends in an all-reduce of `size` bytes around a ring."""
    return 2 * (ranks - 1) * size // ranks
