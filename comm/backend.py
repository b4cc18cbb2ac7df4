"""Starting a backend: `init`, and reading what the launcher left in the environment.

Works under `python -m comm launch`, `mlx.launch`, `mpirun` and alone. MLX's own `init` is always
called strictly and only with a complete environment: it would otherwise remember a group of one
rank for ever.
"""

import atexit
import faulthandler
import functools
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from comm.agent_watch import watch_agent
from comm.capabilities import CAPABILITIES, missing_variables
from comm.environment import environment, ring_hosts
from comm.group import Group
from comm.memory import keep_freed_memory
from comm.rendezvous import rendezvous_of
from comm.subgroups import SubGroups, spend_first_message
from comm.watchdog import start_watchdog, timeout_seconds

CONNECT_SECONDS = 60.0  # at least; a busy machine takes seconds to start its ranks
_ORDER = ("nccl", "jaccl-ring", "jaccl", "ring", "mpi")  # the most particular environment first


def init(backend: str = "any") -> Group:
    """The world: every rank that was launched together.

    Calls with the same backend return the same group, as two groups over one connection would
    corrupt each other's messages.

    Args:
        backend: "any" takes `COMM_BACKEND` or else what the environment is complete for, and a
            group of one rank when nothing was launched. Or one of "ring", "jaccl",
            "jaccl-ring", "mpi", "nccl".

    Raises:
        ValueError: The backend is unknown, not in this MLX, or its environment is incomplete.
    """
    allowed = ("any", *CAPABILITIES)
    if backend not in allowed:
        raise ValueError(f"Unknown backend {backend!r}; allowed are {', '.join(allowed)}.")
    chosen = _chosen(backend, os.environ)
    if chosen is None:
        return _world("none")
    return _world(chosen)


def _chosen(backend: str, environ: Mapping[str, str]) -> str | None:
    if backend == "any":
        backend = environ.get("COMM_BACKEND", "any")
    if backend == "any":
        complete = (name for name in _ORDER if not missing_variables(name, environ))
        return next(complete, None)
    missing = missing_variables(backend, environ)
    if missing:
        ready = [name for name in _ORDER if not missing_variables(name, environ)]
        raise ValueError(
            f"The {backend} backend needs the variables {', '.join(missing)}, which are not set. "
            f"Start the program with `python -m comm launch --backend {backend} -- ...`; "
            f"complete here: {', '.join(ready) or 'none'}."
        )
    return backend


@functools.cache
def _world(backend: str) -> Group:
    watch_agent()
    size = 1 if backend == "none" else _launched_size(backend, os.environ)
    on_host = size != 1 and CAPABILITIES[backend].device == "cpu"
    if on_host or mx.default_device() == mx.cpu:
        keep_freed_memory()
    if size == 1:
        return Group(None, backend)
    limit = CAPABILITIES[backend].max_ranks
    if size and limit and size > limit:
        raise ValueError(f"{backend} reaches at most {limit} ranks, but {size} were launched.")
    world = Group(_connect_all_ranks(backend), backend)
    if not CAPABILITIES[backend].split:
        world.splitter = SubGroups(world)
    world.watchdog = start_watchdog(world)
    # Called before the watchdog's end, which was registered before.
    atexit.register(world.connections.finish)
    faulthandler.cancel_dump_traceback_later()
    return world


def _connect_all_ranks(backend: str) -> mx.distributed.Group:
    """MLX's world. It waits without end, and holding the GIL, for a rank that never starts, so
    until the watchdog runs only a timer outside of Python can end this. So the ranks meet first
    where they can."""
    if timeout := timeout_seconds(os.environ):
        if meeting := rendezvous_of(os.environ):
            meeting.meet(timeout)
        faulthandler.dump_traceback_later(max(timeout, CONNECT_SECONDS), exit=True)
    name = "jaccl" if backend == "jaccl-ring" else backend
    with environment(**_mpi_library(backend)):
        if not mx.distributed.is_available(name):
            raise ValueError(f"This build of MLX has no {backend} backend.")
        try:
            native = mx.distributed.init(strict=True, backend=name)
        except RuntimeError as error:
            if backend != "ring" or "Couldn't connect" not in str(error):
                raise
            raise ConnectionError(_unreached(os.environ, str(error))) from None
    if CAPABILITIES[backend].spoils_first_message:
        spend_first_message(native)
    return native


def _unreached(environ: Mapping[str, str], reason: str) -> str:
    """Between which two ranks of a ring there is no connection; MLX says only that there is none."""
    hosts, rank = ring_hosts(environ), int(environ["MLX_RANK"])
    following = (rank + 1) % len(hosts)
    addresses = " or ".join(hosts[following])
    return f"rank {rank} does not reach rank {following} at {addresses}: {reason}. Is the cable in, and the host file right?"


def _launched_size(backend: str, environ: Mapping[str, str]) -> int | None:
    """How many ranks were launched, where the environment says so."""
    if backend == "ring":
        return max(len(ring_hosts(environ)), 1)
    if backend in ("jaccl", "jaccl-ring"):
        devices = environ.get("JACCL_IBV_DEVICES") or environ["MLX_IBV_DEVICES"]
        return len(json.loads(Path(devices).read_text()))
    size = environ.get("MLX_WORLD_SIZE" if backend == "nccl" else "OMPI_COMM_WORLD_SIZE")
    return int(size) if size else None


def _mpi_library(backend: str) -> dict[str, str]:
    """Where the package index's Open MPI lies, which no loader path names."""
    if backend != "mpi" or "MLX_MPI_LIBNAME" in os.environ:
        return {}
    names = ("libmpi.so.40", "libmpi.so", "libmpi.dylib")
    found = (path for name in names if (path := Path(sys.prefix, "lib", name)).exists())
    library = next(found, None)
    return {"MLX_MPI_LIBNAME": str(library)} if library else {}
