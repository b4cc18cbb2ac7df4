"""The training rows' text, for learning a tokenizer before there is one."""

from collections.abc import Iterator, Mapping
from typing import Any

from .sources import open_split, parse_sources


def corpus(data: Any, seed: int) -> Iterator[str]:
    """Every string in the training rows of a recipe's `data:`, in file order, whatever the rows' format.

    Args:
        data: has `train`.
        seed: for generated rows.
    """
    for source in parse_sources(data.train, "data.train"):
        for raw in open_split(source.path, (source.split or "train",), seed) or ():
            yield from _strings(raw.row)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _strings(part)
