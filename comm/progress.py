"""What this rank is doing, for the watchdog: the last operation and the declared long phase.

Written by the thread that issues operations, read by the watchdog's thread; each field is
replaced whole, so no lock is needed.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Progress:
    """The last operation, how many there were, the long phase, and whether a peer is known lost."""

    def __init__(self) -> None:
        self.last: tuple[int, str, float] = (0, "start", time.monotonic())
        self.phase = ""
        self.lost_peer = False

    def record(self, operation: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Notes that `operation` was issued."""
        name = str(dtype).removeprefix("mlx.core.")
        what = operation if dtype is None else f"{operation} {tuple(shape)} {name}"
        self.last = (self.last[0] + 1, what, time.monotonic())

    @contextmanager
    def long_phase(self, name: str) -> Iterator[None]:
        """While it lasts, no rank's waiting counts towards the watchdog's time-out."""
        outer, self.phase = self.phase, name
        try:
            yield
        finally:
            self.phase = outer
            self.record(f"end of {name}", (), None)
