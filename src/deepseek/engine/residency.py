"""Which experts are in fast memory.

The experts of a quantized checkpoint lie in its files, each in one piece. A budget of bytes is cut into slots of one
expert; every layer has a quota of them. What is not in a slot is read from disk when a token wants it: directly, past
the page cache, so that the budget is the truth.

    warm-up      before the first request: the experts of some names, or the frequent ones of recorded use
    on demand    what a gate has chosen and is not there. The layer computes with what is there while that is read; then
                 with what has come (csrc/layer.cpp, the waves of csrc/quantized.cpp). The sums are in the same order
                 whichever came first, so the result is the same to the bit
    prefetch     what the next layer's gate says of this layer's hidden state, read by a thread in the background (Fate,
                 arXiv 2502.12224, found such guesses right in 97 % of cases)
    replacement  LRFU (Lee et al. 2001): an expert's value is the sum over its visits of 2^(-age / HALF_LIFE), so both
                 frequency and recency count; the least valuable of the same layer goes
    quotas       every REBALANCE steps a slot goes from the layer with the fewest misses to that with the most

The experts of an MTP module are not among them: they are read by mapping, as without a budget.

Addresses change only in calls that the computing thread makes (`fetch`, `prefetch`), and from null to an address when a
read ends, so an expert is never evicted while the kernels use it.

Shape letters: L MoE layers, E experts, K experts a token.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Span
from ..errors import CheckpointError, ConfigError
from ..model import CausalLM, RoutingRecord
from ..model.adapters import bare
from ..ops.native import native
from ..quant.linear import QuantizedExperts
from ..quant.native_stack import NativeStack
from .step_output import StepOutput

HALF_LIFE = 64  # steps
REBALANCE = 128  # steps
ALIGNED = 4096  # bytes: what direct reads want of offsets, lengths and addresses
DIRECT = getattr(os, "O_DIRECT", 0)
AHEAD = 8  # experts of a layer that are prefetched at once, at most


@dataclass
class ResidencyStats:
    """Counters since the start. wanted: experts that a layer of a step asked for; missed: those of them that were not
    resident (nor on their way: late). prefetched: experts read ahead; prefetch_hits: those of them that the layer then
    wanted. stall: seconds in which the computation waited for the disk. read: bytes."""

    wanted: int = 0
    missed: int = 0
    late: int = 0
    prefetched: int = 0
    prefetch_hits: int = 0
    stall: float = 0.0
    read: int = 0

    @property
    def hits(self) -> int:
        return max(0, self.wanted - self.missed - self.late)

    def to_dict(self) -> dict[str, float]:
        return asdict(self) | {"hits": self.hits}


class _Reads:
    """What is to be read, and the lock of a residency: readers hold this, and the residency for one read at a time, so
    that it ends with the model that it serves."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.urgent: deque[tuple[int, int]] = deque()  # (moe_layer, expert): a layer waits for it
        self.later: deque[tuple[int, int]] = deque()  # read ahead
        self.failed: BaseException | None = None
        self.closed = False

    def next(self) -> tuple[int, int] | None:
        """Waits for something to read; None when it is over."""
        with self.changed:
            while not self.closed and not self.urgent and not self.later:
                self.changed.wait()
            return None if self.closed else (self.urgent or self.later).popleft()

    def run(self, residency: weakref.ref[Residency]) -> None:
        """A reader."""
        while (item := self.next()) is not None and (own := residency()) is not None:
            try:
                own._read(*item)
            except BaseException as error:  # the computing thread raises it
                with self.changed:
                    self.failed = error.with_traceback(None)
                    self.changed.notify_all()
                return
            del own

    def close(self, threads: Sequence[threading.Thread], files: dict[Path, int]) -> None:
        """Stop the readers, also before the interpreter goes: none is caught holding what is taken apart."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join()
        while files:
            os.close(files.popitem()[1])


class _Layer:
    """The slots of one layer. slot_of: expert -> slot, of those resident or on their way."""

    def __init__(self, table: Tensor, spans: Sequence[Span]) -> None:
        self.table, self.spans = table, spans  # table: addresses, 0 while an expert is not there
        self.slot_of: dict[int, int] = {}
        self.in_flight: set[int] = set()
        self.prefetched: set[int] = set()  # read ahead and not yet asked for
        self.requested: set[int] = set()  # in this step
        self.value = [0.0] * len(spans)
        self.missed = 0


class Residency:
    """The experts of a model in a budget. `budget`: bytes.

    Raises ConfigError for a model without quantized experts and for a budget that not even one expert a layer fits.
    """

    def __init__(self, model: CausalLM, spans: dict[int, list[Span]], budget: int, *,
                 prefetch: bool = True) -> None:
        blocks = {layer: block for layer, block in model.moe_blocks().items() if layer in model.config.moe_layers}
        stack = NativeStack.of(model)
        if stack is None or not NativeStack.exact(model) or not all(
                isinstance(bare(block.experts), QuantizedExperts) for block in blocks.values()) or not spans:
            raise ConfigError("expert_memory bounds the experts of a quantized model on the CPU, run by the native "
                              "kernels: `deepseek quantize` makes one")
        self.step = 0
        self.stats = ResidencyStats()
        self._slot = slot_bytes(spans)
        count, self.least = budget // self._slot, len(spans) * self._slot
        if count < len(spans):
            raise ConfigError(f"expert_memory = {budget:,} bytes: the least that works is {self.least:,} (one expert "
                              f"of {self._slot:,} bytes for each of {len(spans)} layers)")
        count = min(count, sum(map(len, spans.values())))
        self._memory = mmap.mmap(-1, count * self._slot, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        view = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._base = view.data_ptr()
        self._view = memoryview(self._memory)
        self._free = list(range(count - 1, -1, -1))
        self.layers = []
        tables = []
        for layer, own in spans.items():
            experts = bare(blocks[layer].experts)
            assert isinstance(experts, QuantizedExperts)
            experts.table.addresses.zero_()
            tables.append(experts.table)
            self.layers.append(_Layer(experts.table.addresses, own))
        each, more = divmod(count, len(self.layers))
        self.quota = [min(each + (i < more), len(own.spans)) for i, own in enumerate(self.layers)]
        self.budget, self.experts = count * self._slot, len(next(iter(spans.values())))
        self.missed_LE = torch.zeros(len(spans), self.experts, dtype=torch.int64)
        self.top_k, self._process = model.config.num_experts_per_tok, os.getpid()
        self._files = {path: _open(path) for path in {span.file for own in spans.values() for span in own}}
        self._reads = _Reads()
        self._changed, self._urgent, self._later = self._reads.changed, self._reads.urgent, self._reads.later
        # the stack holds this one, whose memory its tables point to; nothing here holds the model
        stack.residency = native.Residency(self.fetch, self.prefetch if prefetch else None)
        for moe_layer, table in enumerate(tables):
            table.fetch = stack.residency, moe_layer
        threads = [threading.Thread(target=self._reads.run, args=(weakref.ref(self),), name=f"experts-{i}", daemon=True)
                   for i in range(2)]
        for thread in threads:
            thread.start()
        self.close = weakref.finalize(self, self._reads.close, threads, self._files)  # may be called; else at the end

    @property
    def _alone(self) -> bool:
        """Whether there are no readers: after `close`, and in a fork, whose locks may be held by threads it has not."""
        return self._reads.closed or os.getpid() != self._process

    # ---- what the kernels ask -----------------------------------------------------------------------------------

    def fetch(self, moe_layer: int, wanted: Sequence[int]) -> list[int]:
        """Load at least one of the wanted experts and pin them until the next call for that layer; returns those that
        are resident."""
        layer, keep = self.layers[moe_layer], set(wanted)
        if self._alone:
            if not (here := [e for e in wanted if layer.table[e]]):
                raise ConfigError(f"expert {wanted[0]} of MoE layer {moe_layer} is not in memory and is not read: "
                                  "the model was closed, or this process is a fork of the one that loaded it")
            return here
        with self._changed:
            new = keep - layer.requested  # else an earlier wave has counted it
            late, missed = len(new & layer.in_flight), [e for e in new if e not in layer.slot_of]
            self.stats.late, self.stats.missed = self.stats.late + late, self.stats.missed + len(missed)
            layer.missed += len(missed)
            if absent := [e for e in new if e not in layer.slot_of or e in layer.in_flight]:
                self.missed_LE[moe_layer, absent] += 1
            layer.requested |= new
            self.stats.prefetch_hits += len(new & layer.prefetched)
            layer.prefetched -= new
            for item in [item for item in self._later if item[0] == moe_layer]:
                self._later.remove(item)
                if item[1] in keep:
                    self._urgent.append(item)
                else:  # prefetched in vain, and not begun
                    self._free.append(layer.slot_of.pop(item[1]))
                    layer.in_flight.discard(item[1])
                    layer.prefetched.discard(item[1])
                    self.stats.prefetched -= 1
            began = time.perf_counter()
            while True:
                for e in wanted:
                    if e not in layer.slot_of and self._assign_slot(moe_layer, e, keep):
                        self._urgent.append((moe_layer, e))
                self._changed.notify_all()
                here = [e for e in wanted if e in layer.slot_of and e not in layer.in_flight]
                if here:
                    self.stats.stall += time.perf_counter() - began
                    return here
                awaited = layer.in_flight & keep or set(layer.in_flight)
                assert awaited, "a layer has a slot at least"
                while self._reads.failed is None and layer.in_flight & awaited:
                    self._changed.wait()
                if self._reads.failed is not None:
                    raise copy(self._reads.failed)  # its own traceback would hold the model for ever

    def prefetch(self, moe_layer: int, likely: Sequence[int]) -> None:
        """Start reading what a layer will probably want, most wanted first."""
        layer = self.layers[moe_layer]
        if self.quota[moe_layer] < self.top_k or self._alone:  # one prefetched would evict another
            return
        with self._changed:
            keep, absent = set(likely), [e for e in likely if e not in layer.slot_of]
            for e in absent[:AHEAD]:
                if not self._assign_slot(moe_layer, e, keep):
                    break
                layer.prefetched.add(e)
                self.stats.prefetched += 1
                self._later.append((moe_layer, e))
            self._changed.notify_all()

    def _assign_slot(self, moe_layer: int, expert: int, keep: set[int]) -> bool:
        """A slot of the layer for an expert: a free one, or that of the least valuable other."""
        layer = self.layers[moe_layer]
        if len(layer.slot_of) >= self.quota[moe_layer] or not self._free:
            able = [e for e in layer.slot_of if e not in keep and e not in layer.in_flight]
            if not able:
                return False
            self._evict(layer, min(able, key=lambda e: layer.value[e]))
        layer.slot_of[expert] = self._free.pop()
        layer.in_flight.add(expert)
        return True

    def _evict(self, layer: _Layer, expert: int) -> None:
        layer.table[expert] = 0
        layer.prefetched.discard(expert)
        self._free.append(layer.slot_of.pop(expert))

    # ---- reading ------------------------------------------------------------------------------------------------

    def _read(self, moe_layer: int, expert: int) -> None:
        with self._changed:
            slot = self.layers[moe_layer].slot_of.get(expert)
            if slot is None:  # not wanted any more
                return
        span = self.layers[moe_layer].spans[expert]
        begin = span.offset // ALIGNED * ALIGNED
        skip = span.offset - begin
        room = self._view[slot * self._slot :][: _up(skip + span.size)]
        got = 0
        while got < skip + span.size:
            count = os.preadv(self._files[span.file], [room[got:]], begin + got)
            if count == 0:
                raise CheckpointError(f"{span.file}: ends within expert {expert}: the file has shrunk")
            got += count
            if got < skip + span.size and count % ALIGNED:
                raise CheckpointError(f"{span.file}: a read of {len(room)} bytes ended after {got}")
        if not DIRECT & fcntl.fcntl(self._files[span.file], fcntl.F_GETFL):
            os.posix_fadvise(self._files[span.file], begin, got, os.POSIX_FADV_DONTNEED)
        with self._changed:
            layer = self.layers[moe_layer]
            layer.table[expert] = self._base + slot * self._slot + skip
            layer.in_flight.discard(expert)
            self.stats.read += got
            self._changed.notify_all()

    # ---- between steps ------------------------------------------------------------------------------------------

    def wants_routes(self, batch: object) -> bool:
        return True

    def on_step(self, output: StepOutput) -> None:
        if output.routing is not None:
            self.count_routes(output.routing)

    def count_routes(self, routing: RoutingRecord) -> None:
        """Count a step's routes."""
        with self._changed:
            self.step += 1
            now = 2.0 ** (self.step % HALF_LIFE / HALF_LIFE)  # ages by growing what is new
            for row, layer_index in enumerate(sorted(routing.routes)):
                layer = self.layers[row]
                layer.requested = set()
                if self.step % HALF_LIFE == 0:
                    layer.value = [value / 2 for value in layer.value]
                index = routing.routes[layer_index].index_TK
                count_E = torch.bincount(index[index >= 0].flatten(), minlength=self.experts).tolist()
                for e, count in enumerate(count_E):
                    if count:
                        layer.value[e] += now * count
                        self.stats.wanted += 1
                        if e in layer.prefetched:
                            layer.prefetched.discard(e)
                            self.stats.prefetch_hits += 1
            if self.step % REBALANCE == 0:
                self._rebalance()

    def _rebalance(self) -> None:
        most = max(range(len(self.layers)), key=lambda i: self.layers[i].missed * (self.quota[i] < self.experts))
        least = min(range(len(self.layers)), key=lambda i: self.layers[i].missed if self.quota[i] > 1 else 1 << 60)
        giver, taker = self.layers[least], self.layers[most]
        if taker.missed > 2 * giver.missed and most != least and self.quota[least] > 1 and not giver.in_flight:
            self.quota[least] -= 1
            self.quota[most] += 1
            if len(giver.slot_of) > self.quota[least]:
                self._evict(giver, min(giver.slot_of, key=lambda e: giver.value[e]))
        for layer in self.layers:
            layer.missed //= 2

    def loaded(self, moe_layer: int) -> Tensor:
        """Boolean [E]: the experts that are there."""
        return self.layers[moe_layer].table != 0

    # ---- warm-up ------------------------------------------------------------------------------------------------

    def warm(self, order: Sequence[Iterable[int]]) -> int:
        """Get experts into memory between steps, in the order given for each layer, as many as its quota; what is least
        valuable of others makes room. How many were read."""
        read = 0
        with self._changed:
            self._wait_for_reads()  # what is on its way cannot make room
            for moe_layer, (layer, experts) in enumerate(zip(self.layers, order, strict=True)):
                most, keep = max(layer.value), set[int]()
                for rank, e in enumerate(experts):
                    if len(keep) >= self.quota[moe_layer]:
                        break
                    keep.add(e)
                    layer.value[e] = max(layer.value[e], most + 1.0 / (1 + rank))  # they stay for a while
                    if e not in layer.slot_of and self._assign_slot(moe_layer, e, keep):
                        self._later.append((moe_layer, e))
                        read += 1
            self._changed.notify_all()
            self._wait_for_reads()
        return read

    def _wait_for_reads(self) -> None:
        while self._reads.failed is None and any(layer.in_flight for layer in self.layers):
            self._changed.wait()
        if self._reads.failed is not None:
            raise copy(self._reads.failed)


def slot_bytes(spans: dict[int, list[Span]]) -> int:
    """What an expert takes of the budget: its bytes, and room to read them in whole blocks from where they begin."""
    return max(_up(span.size) + ALIGNED for own in spans.values() for span in own)


def _open(path: Path) -> int:
    """For reading past the page cache; where a file system cannot, what was read is dropped from it."""
    try:
        return os.open(path, os.O_RDONLY | DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise CheckpointError(f"{path}: {error.strerror}") from None
        return os.open(path, os.O_RDONLY)


def _up(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def report(stats: ResidencyStats, extra: dict[str, Any] | None = None) -> str:
    """One line for people."""
    share = stats.hits / stats.wanted if stats.wanted else 0.0
    right = stats.prefetch_hits / stats.prefetched if stats.prefetched else 0.0
    return (f"experts: {stats.wanted:,} wanted, {share:.1%} there, {stats.missed:,} missed, {stats.late:,} late; "
            f"{stats.prefetched:,} read ahead, {right:.0%} of them used; {stats.read / 2**20:,.0f} MiB read, "
            f"{stats.stall:.1f} s waited")
