"""Progress bars: drawn in place on a terminal, a line every ten seconds at most anywhere else."""

from __future__ import annotations

import time
from typing import Any

from tqdm import tqdm

SECONDS = 10.0  # between two lines of a log


class ProgressBar(tqdm):
    """tqdm for terminals and for logs: where the output is not a terminal, whole lines without carriage returns, and
    the final state once, even of a bar that a terminal would wipe."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._next: float | None = None  # when the next line of a log is due; None on a terminal
        super().__init__(*args, **{"dynamic_ncols": True} | kwargs)

    def _in_lines(self) -> bool:
        if self._next is None and not self.disable:
            isatty = getattr(self.fp, "isatty", None)
            if isatty is not None and isatty():
                return False
            self._next = time.monotonic() + SECONDS
        return self._next is not None

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if not self._in_lines():
            super().display(msg, pos)
        elif self._next is not None and time.monotonic() >= self._next:
            self._line()
            self._next = time.monotonic() + SECONDS

    def clear(self, nolock: bool = False) -> None:
        if not self._in_lines():
            super().clear(nolock)

    def close(self) -> None:
        if not self.disable and self._in_lines():
            self._line()
            del self.sp  # tqdm's own last writing, in place
        super().close()

    def advance_to(self, done: int, total: int | None = None) -> None:
        """Show that so much is done, of `total` where that is given."""
        self.total = self.total if total is None else total
        self.update(done - self.n)

    def _line(self) -> None:
        self.fp.write(f"{self}\n")
        self.fp.flush()
