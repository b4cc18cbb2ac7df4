"""One run at a time in an output folder: rank 0 holds a lock on a file there while the run lives.

The lock is the kernel's (`flock`), so a killed run keeps none; the file only says who has it. A file system without
locks leaves the folder unguarded.
"""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import comm
from trainer.agreement import together

LOCK_FILE = ".lock"


@contextmanager
def sole_run(world: comm.Group, output_dir: Path | None) -> Iterator[None]:
    """Keep other runs out of the folder for the duration of a `with` block. Every rank calls it.

    Args:
        world: All ranks.
        output_dir: The run's folder: made if need be, and removed if nothing was put into it; None on ranks without a
            disk.

    Raises:
        AgreedUserError: Another run has the folder; the text names its process and host.
    """
    is_new = output_dir is not None and not output_dir.exists()
    held = together(world, lambda: _hold(output_dir) if output_dir is not None else None)
    try:
        yield
    finally:
        if held is not None and output_dir is not None:
            # Before the lock goes: afterwards the file may be another run's.
            (output_dir / LOCK_FILE).unlink(missing_ok=True)
            held.close()
            if is_new:
                with suppress(OSError):
                    output_dir.rmdir()


def _hold(output_dir: Path) -> TextIO | None:
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / LOCK_FILE
    while True:
        file = open(path, "a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                raise ValueError(
                    f"output_dir = {str(output_dir)!r} is in use by {_owner(file)}; "
                    "end that run, or give another output_dir."
                ) from None
        except OSError:  # a file system without locks
            file.close()
            path.unlink(missing_ok=True)
            return None
        # The run that ended in between took its file away: this lock would guard nothing.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()
    file.truncate(0)
    file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}) + "\n")
    file.flush()
    return file


def _owner(file: TextIO) -> str:
    file.seek(0)
    try:
        owner = json.loads(file.read())
        return f"process {owner['pid']} on {owner['host']}"
    except (ValueError, KeyError, TypeError):
        return "another run"
