"""What a person asks of a running training: a signal to stop, or a checkpoint now."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comm

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TRIGGER_FILE = "checkpoint.now"


class Stop:
    """Remembers the signal that asked this process to stop; a second one ends it at once, SIGHUP not counted."""

    def __init__(self):
        self.number = 0

    def install(self) -> "Stop":
        """Take over Ctrl-C, SIGTERM, and SIGHUP where the process does not ignore it (`nohup`)."""
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN or number != signal.SIGHUP:
                signal.signal(number, self._receive)
        return self

    @contextmanager
    def installed(self) -> Iterator["Stop"]:
        """Take the signals over for the duration of a `with` block; outside of the main thread they stay as they are."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        kept = {number: signal.getsignal(number) for number in SIGNALS}
        try:
            yield self.install()
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)

    def requested(self) -> int:
        """The signal received so far, or 0."""
        return self.number

    def reader_gone(self) -> None:
        """Nobody reads the output any more, as behind `| head`: as if SIGPIPE had come."""
        self.number = self.number or signal.SIGPIPE

    def _receive(self, number: int, frame: Any) -> None:
        # A terminal that goes away may say so twice, and nobody is impatient then.
        if number != signal.SIGHUP and self.number not in (0, signal.SIGHUP):
            comm.leave(128 + number)
        self.number = number


class CheckpointTrigger:
    """A file that asks for a checkpoint: `touch OUTPUT_DIR/checkpoint.now`. It is removed when the checkpoint stands.

    Args:
        output_dir: The run's folder; None on ranks without one, which are never asked.
        notice: Gets one line when the file cannot be removed; it is no longer looked for then.
    """

    def __init__(self, output_dir: Path | None, notice: Callable[[str], None]):
        self.file = output_dir and output_dir / TRIGGER_FILE
        self._notice = notice

    def is_there(self) -> bool:
        """Whether a checkpoint is asked for."""
        return self.file is not None and self.file.exists()

    def done(self) -> None:
        """A checkpoint stands."""
        try:
            if self.file is not None:
                self.file.unlink(missing_ok=True)
        except OSError as error:
            self._notice(f"{self.file} cannot be removed ({error.strerror}) and is ignored from now on.")
            self.file = None
