"""Writing behind a run: copies of the state are taken at once, and a thread writes them while training continues.

What is written is the state at that instant, and a folder or file appears whole, as without the thread. The copies take
as much memory as the state for as long as they are written; where so much is not free, the run waits for the writing
as it would without. (Asynchronous saving as in torch.distributed.checkpoint.async_save, which copies to the CPU first.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from torch import Tensor

from ..interrupts import held
from ..memory import ram

SPARE = 2  # times the copies must be free, as writing takes some too


class Saving:
    """Writes one state at a time. As a context: what was begun is written when it ends."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "saving")
        self._begun: list[Future[object]] = []

    def start(self, write: Callable[[], object], *, behind: bool) -> None:
        """Write, after what was begun before: in the thread, or (not behind) now."""
        if behind:
            self._begun.append(self._pool.submit(write))
        else:
            self.wait()
            write()

    def check(self) -> None:
        """Raises what has gone wrong in what is written by now."""
        while self._begun and self._begun[0].done():
            self._begun.pop(0).result()

    def wait(self) -> None:
        """Until all is written. Raises what went wrong."""
        with held("the checkpoint that is being written is finished"):
            while self._begun:
                self._begun.pop(0).result()

    def __enter__(self) -> Saving:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:
        self.wait()


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """In the memory of the CPU; None where that has no room for them."""
    if SPARE * sum(tensor.nbytes for tensor in tensors.values()) > ram()[1]:
        return None
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
