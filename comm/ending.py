"""Ending a rank after an error, without the clean-up that waits for the other ranks."""

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from comm.progress import Progress

GRACE_SECONDS = 2.0  # for ranks that fail together to report their own errors
farewells: list[Callable[[], None]] = []  # called by `leave` where there is no error


def leave_after(hook: Callable[..., Any], progress: Progress) -> Callable[..., None]:
    """An exception hook that runs `hook` and then ends the process without MPI's clean-up."""

    def report(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        hook(kind, error, trace)
        if is_lost_peer(error):
            progress.lost_peer = True
        leave(130 if issubclass(kind, KeyboardInterrupt) else 1, error)

    return report


def leave(code: int, error: BaseException | None = None) -> None:
    """Ends this process at once with exit code `code`, without MLX's or MPI's clean-up.

    The only safe exit after an error on one of several ranks: MPI's clean-up waits for ranks that
    are themselves waiting for this one. Never returns. With an error (by default the one being
    handled) the watchdog ends the other ranks too; if it is only that a peer is gone, this first
    gives the watchdog the time to name that peer. Without one this rank says goodbye, and the
    others may go on.
    """
    error = error or sys.exc_info()[1]
    if error is None:
        for farewell in farewells:
            farewell()
    sys.stdout.flush()
    sys.stderr.flush()
    if is_lost_peer(error):
        time.sleep(3 * GRACE_SECONDS)
    os._exit(code)


def is_lost_peer(error: BaseException | None) -> bool:
    """Whether this is MLX's error on a ring that a neighbour has left."""
    return isinstance(error, RuntimeError) and "connection to a peer was lost" in str(error)
