"""What this rank is doing, for the watchdog: the last operation and the declared long phase.

Written by the thread that issues operations, read by the watchdog's thread; each field is
replaced whole, so no lock is needed.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

# Other packages work here and report nothing: that the processor works is progress.
BY_PROCESSOR = ("loading",)
# A person types, who may take any time.
WITHOUT_BOUND = ("reading",)


class Progress:
    """The last operation, how many there were, the long phase, and whether a peer is known lost."""

    def __init__(self) -> None:
        self.last: tuple[int, str, float] = (0, "start", time.monotonic())
        self.needs_others = False
        self.phase = ""
        self.num_reports = 0
        self.lost_peer = False

    def record(self, operation: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Notes that `operation` was issued; without a dtype, that something is over."""
        name = str(dtype).removeprefix("mlx.core.")
        what = operation if dtype is None else f"{operation} {tuple(shape)} {name}"
        self.needs_others = dtype is not None
        self.last = (self.last[0] + 1, what, time.monotonic())

    def settle(self) -> None:
        """Notes that the last operation is over on this rank, which from here on works alone."""
        self.needs_others = False

    @contextmanager
    def long_phase(self, name: str) -> Iterator[None]:
        """While it lasts, no rank's waiting counts towards the watchdog's time-out.

        Where no rank's main thread moves, issues an operation or reports for
        `COMM_PHASE_TIMEOUT` seconds, the watchdog takes it for a hang. In the phase "loading" a
        rank also moves as long as its other threads, which may download, use the processor; the
        phase "reading" waits for a person and has no bound.
        """
        outer, self.phase = self.phase, name
        self.settle()
        self.report()
        try:
            yield
        finally:
            self.phase = outer
            self.record(f"end of {name}", (), None)

    def report(self) -> None:
        """Notes that the long phase goes on; call it wherever a part of the work is done."""
        self.num_reports += 1

    def reporting(self, parts: Iterable[T]) -> Iterator[T]:
        """`parts`, with a report before each one."""
        for part in parts:
            self.report()
            yield part
