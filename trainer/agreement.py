"""Ranks that stay together: one rank's error becomes every rank's, and they compare what they loaded.

Between these points a rank may fail alone (a missing file, a full disk) without leaving others in a collective.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any, TypeVar

import mlx.core as mx

import comm
from trainer import __version__
from trainer.recipe.problems import USER_ERRORS, AgreedSystemError, AgreedUserError, sentence

Result = TypeVar("Result")
Notice = Callable[[str], None]  # gets one line that the user should know
EXPECTED = (ValueError, OSError)


def together(world: comm.Group, work: Callable[[], Result]) -> Result:
    """Do `work` on every rank; if it fails on any, all ranks raise.

    Args:
        world: All ranks.
        work: What every rank does; it must not communicate.

    Raises:
        AgreedUserError: A ValueError; `work` failed somewhere with what the user can mend. The text is the error's own
            where all ranks met the same, else it names each rank and host.
        AgreedSystemError: An OSError; likewise, when it failed with something else, such as a full disk.
    """
    failure: Exception | None = None
    try:
        result = work()
    except EXPECTED as error:
        failure = error
    problem, is_users = failure and sentence(failure), failure is None or isinstance(failure, USER_ERRORS)
    problems = comm.all_gather_object([problem, is_users], world)
    texts = [text for text, _ in problems]
    if not any(texts):
        return result
    kind = AgreedUserError if all(users for _, users in problems) else AgreedSystemError
    if len(set(texts)) == 1:
        raise kind(texts[0]) from failure
    hosts = comm.all_gather_object(socket.gethostname(), world)
    raise kind("\n".join(f"rank {r} on {hosts[r]}: {text}" for r, text in enumerate(texts) if text)) from failure


def end_on_interrupt(world: comm.Group) -> None:
    """Let Ctrl-C end this process at once, as a rank that waits for another one inside MLX never sees it."""
    if world.size > 1:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def require_same(world: comm.Group, digests: dict[str, Any]) -> None:
    """Compare digests between ranks, together with the versions of MLX, mlx-lm and this package.

    Args:
        world: All ranks.
        digests: Name of a thing that must be equal everywhere, to a JSON-able digest of it.

    Raises:
        AgreedUserError: They differ; the text names the things, the hosts and what each has.
    """
    mine = {f"version of {name}": version(name) for name in ("mlx", "mlx-lm")}
    mine |= {"version of mlx-trainer": __version__} | digests
    everyone = comm.all_gather_object([socket.gethostname(), mine], world)
    lines = []
    for name in mine:
        values = [seen[name] for _, seen in everyone]
        if any(value != values[0] for value in values):
            held = ", ".join(f"rank {r} on {host}: {seen[name]}" for r, (host, seen) in enumerate(everyone))
            lines.append(f"the {name} differs ({held})")
    if lines:
        raise AgreedUserError("The ranks do not agree: " + "; ".join(lines) + ". Give every host the same files.")


def broadcast_tensors(world: comm.Group, tensors: dict[str, mx.array] | None) -> Iterator[tuple[str, mx.array]]:
    """Rank 0's tensors on every rank, one at a time, as `(name, array)` pairs.

    Args:
        world: All ranks.
        tensors: Rank 0's tensors by name; ignored elsewhere.
    """
    listing = [(n, list(t.shape), str(t.dtype).removeprefix("mlx.core.")) for n, t in (tensors or {}).items()]
    for name, shape, dtype in comm.broadcast_object(listing, world):
        own = tensors[name] if tensors and world.rank == 0 else mx.zeros(shape, dtype=getattr(mx, dtype))
        received = world.broadcast(own)
        # Now: a rank that has no use for this tensor must take part all the same.
        mx.eval(received)
        yield name, received
