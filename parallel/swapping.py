"""Arrays of a module replaced for a while: for a trace, whose arrays must not stay, or for a call with other weights."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

Slot = tuple[Any, Any]  # a module and the name of one of its own arrays, or a list of arrays and an index


def slots_of(module: nn.Module, names: Iterable[str]) -> list[Slot]:
    """Where arrays stand, by their dotted names in `module`, such as "layers.0.mlp.up_proj.weight"."""
    return [_slot(module, name) for name in names]


@contextmanager
def swapped(slots: Sequence[Slot], arrays: Iterable[mx.array]) -> Iterator[None]:
    """Within this context each slot holds the array of its place; afterwards, also after an error, its own again.

    With its own arrays it takes back only what others put there, such as a trace of `nn.value_and_grad`.

    Args:
        slots: The places, from `slots_of`.
        arrays: As many as there are slots.
    """
    own = [module[name] for module, name in slots]
    _put(slots, arrays)
    try:
        yield
    finally:
        _put(slots, own)


def _put(slots: Sequence[Slot], arrays: Iterable[mx.array]) -> None:
    for (module, name), array in zip(slots, arrays, strict=True):
        module[name] = array


def _slot(module: nn.Module, name: str) -> Slot:
    *path, last = name.split(".")
    found: Any = module
    for step in path:
        found = found[_key(found, step)]
    return found, _key(found, last)


def _key(holder: Any, step: str) -> str | int:
    return int(step) if isinstance(holder, (list, tuple)) else step
