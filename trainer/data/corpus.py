"""The training rows' text, for learning a tokenizer before there is one."""

from collections.abc import Iterator, Mapping
from typing import Any

from trainer.recipe.config import DataConfig

from .formats import detect_format
from .sources import listed_sources, open_split


def corpus(data: DataConfig, seed: int) -> Iterator[str]:
    """Every string in the training rows of a recipe's `data:`, in file order, whatever the rows' format.

    Args:
        data: The recipe's `data:`.
        seed: The seed of generated rows.
    """
    for source in listed_sources(data.train, "data.train"):
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


def training_format(data: DataConfig, seed: int) -> str:
    """The format of the training rows ("text", "completion", "chat" or "alpaca"), by the first row if it is auto."""
    source = listed_sources(data.train, "data.train")[0]
    chosen = source.format or data.format
    if chosen != "auto":
        return chosen
    rows = open_split(source.path, (source.split or "train",), seed) or ()
    return next(detect_format(raw.row, source.columns or {}) for raw in rows if raw.row is not None)
