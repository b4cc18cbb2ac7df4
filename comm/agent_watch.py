"""Ends a rank whose launcher's agent is gone: on Linux the kernel ends its direct child only, on macOS none.

An agent that is killed cannot end the program that it started. So the program waits for the agent's end, without
polling: on its process descriptor on Linux, on a kernel queue on macOS.
"""

import os
import select
import signal
import threading
from collections.abc import Mapping

AGENT = "COMM_AGENT"  # the agent's process id, in the environment of what it starts


def watch_agent(environ: Mapping[str, str] = os.environ) -> threading.Thread | None:
    """Start a thread that kills this process's group once the agent named in `environ` has ended.

    Returns:
        The thread, or None where no agent started this process or the system has no way to wait for it.
    """
    if AGENT not in environ or not (hasattr(os, "pidfd_open") or hasattr(select, "kqueue")):
        return None
    thread = threading.Thread(target=_end_with, args=(int(environ[AGENT]),), name="comm-agent-watch", daemon=True)
    thread.start()
    return thread


def _end_with(pid: int) -> None:
    try:
        _wait_for_end(pid)
    except ProcessLookupError:
        pass  # it has ended before
    except OSError:
        return  # no descriptor is left, or the system does not allow it
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _wait_for_end(pid: int) -> None:
    if hasattr(select, "kqueue"):
        queue = select.kqueue()
        event = select.kevent(pid, select.KQ_FILTER_PROC, select.KQ_EV_ADD, select.KQ_NOTE_EXIT)
        queue.control([event], 1)
    else:
        select.select([os.pidfd_open(pid)], [], [])
