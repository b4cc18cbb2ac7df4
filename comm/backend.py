"""Starting a backend: `init`, `leave`, and reading what the launcher left in the environment.

Works under `python -m comm launch`, `mlx.launch`, `mpirun` and alone. MLX's own `init` is always
called strictly and only with a complete environment: it would otherwise remember a group of one
rank for ever.
"""

import functools
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from comm.capabilities import CAPABILITIES
from comm.group import Group

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


def leave(code: int) -> None:
    """Ends this process at once with exit code `code`, without MLX's or MPI's clean-up.

    The only safe exit after an error on one of several ranks: MPI's clean-up waits for ranks that
    are themselves waiting for this one. Never returns.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def missing_variables(backend: str, environ: Mapping[str, str]) -> list[str]:
    """The environment variables that `backend` needs and does not find."""
    return [
        " or ".join(names.split("|"))
        for names in CAPABILITIES[backend].variables
        if not any(name in environ for name in names.split("|"))
    ]


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
    if backend == "none" or _launched_size(backend, os.environ) == 1:
        return Group(None, backend)
    name = "jaccl" if backend == "jaccl-ring" else backend
    with environment(**_mpi_library(backend)):
        if not mx.distributed.is_available(name):
            raise ValueError(f"This build of MLX has no {backend} backend.")
        native = mx.distributed.init(strict=True, backend=name)
    return Group(native, backend)


def _launched_size(backend: str, environ: Mapping[str, str]) -> int | None:
    """How many ranks were launched, where the environment says so."""
    if backend == "ring":
        return max(len(ring_hosts(environ)), 1)
    if backend in ("jaccl", "jaccl-ring"):
        devices = environ.get("JACCL_IBV_DEVICES") or environ["MLX_IBV_DEVICES"]
        return len(json.loads(Path(devices).read_text()))
    size = environ.get("MLX_WORLD_SIZE" if backend == "nccl" else "OMPI_COMM_WORLD_SIZE")
    return int(size) if size else None


def ring_hosts(environ: Mapping[str, str]) -> list[list[str]]:
    """The "ip:port" addresses of each rank in `MLX_HOSTFILE`; none in `mlx.launch -n 1`'s.

    Raises:
        ValueError: The file is not a list of lists of addresses, or has no entry for this rank.
    """
    path, rank = environ["MLX_HOSTFILE"], environ["MLX_RANK"]
    text = Path(path).read_text().strip()
    if not text:
        return []
    try:
        hosts = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"MLX_HOSTFILE={path} is not JSON: {error}.") from None
    if not isinstance(hosts, list) or not all(isinstance(host, list) for host in hosts):
        raise ValueError(f'MLX_HOSTFILE={path} must hold a list of lists of "ip:port".')
    if not rank.isdigit() or int(rank) >= len(hosts):
        raise ValueError(f"MLX_RANK={rank}, but MLX_HOSTFILE={path} names {len(hosts)} ranks.")
    return hosts


def _mpi_library(backend: str) -> dict[str, str]:
    """Where the package index's Open MPI lies, which no loader path names."""
    if backend != "mpi" or "MLX_MPI_LIBNAME" in os.environ:
        return {}
    names = ("libmpi.so.40", "libmpi.so", "libmpi.dylib")
    found = (path for name in names if (path := Path(sys.prefix, "lib", name)).exists())
    library = next(found, None)
    return {"MLX_MPI_LIBNAME": str(library)} if library else {}


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Sets environment variables for the duration of a `with` block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
