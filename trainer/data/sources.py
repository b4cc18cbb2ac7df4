"""Where rows come from: a local file, a folder of splits, a Hugging Face data set, or a generator.

`open_split` finds a split of a source and gives the reader of its rows; nothing is read before it is iterated.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.nearest import nearest

from .files import SUFFIXES, RawRow, RowFile, open_file
from .hub import open_hub_split
from .synthetic import SPLIT_ROWS, synthetic_rows

VALID_NAMES = ("valid", "validation", "val", "dev")
SYNTHETIC = "synthetic:"


@dataclass(frozen=True)
class Source:
    """One entry of `data.train`.

    `split` and `format` None: the usual ones. `weight`: how often each row appears in an epoch. `columns`: our
    column name -> the source's.
    """

    path: str
    split: str | None = None
    weight: float = 1.0
    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


def parse_sources(value: Any, key: str) -> list[Source]:
    """`data.train` or `data.valid` as a list of sources.

    Args:
        value: a path, or a list of paths and of mappings or objects with path, split, weight, format and columns.
        key: the recipe key, for messages.

    Raises:
        ValueError: for unknown keys, a missing path or a weight that is not positive.
    """
    entries = [value] if isinstance(value, str) else list(value)
    if not entries:
        raise ValueError(f"{key} is an empty list; give at least one path.")
    sources = []
    for position, entry in enumerate(entries):
        if isinstance(entry, str):
            entry = {"path": entry}
        entry = dict(entry if isinstance(entry, Mapping) else vars(entry))
        allowed = list(Source.__dataclass_fields__)
        if unknown := [name for name in entry if name not in allowed]:
            near = nearest(unknown[0], allowed)
            hint = f" Did you mean {near!r}?" if near else ""
            raise ValueError(f"{key}[{position}] has the key {unknown[0]!r}; allowed: {', '.join(allowed)}.{hint}")
        if not isinstance(entry.get("path"), str):
            raise ValueError(f"{key}[{position}] needs a path.")
        source = Source(**{name: value for name, value in entry.items() if value is not None})
        if not source.weight > 0:
            raise ValueError(f"{key}[{position}].weight is {source.weight}; it must be above 0.")
        sources.append(source)
    return sources


def open_split(path: str, names: tuple[str, ...], seed: int) -> RowFile | None:
    """The first of these splits that a source has.

    Args:
        path: `synthetic:NAME`, a file, a folder or a Hugging Face repo.
        names: split names in order of preference; a single file has only "train".
        seed: for generators.

    Returns:
        None when the source has none of them.

    Raises:
        ValueError: when there is no such source, with the nearest name.
    """
    if path.startswith(SYNTHETIC):
        name = next((name for name in names if name in SPLIT_ROWS), None)
        return Synthetic(path.removeprefix(SYNTHETIC), name, seed) if name else None
    local = Path(path).expanduser()
    if local.is_dir():
        files = (local / (name + suffix) for name in names for suffix in SUFFIXES)
        found = next((file for file in files if file.is_file()), None)
        if found is None and not any(file.suffix in SUFFIXES for file in local.iterdir()):
            raise ValueError(f"The folder {path} holds no {', '.join(SUFFIXES)} files; it needs train.jsonl.")
        return open_file(found) if found else None
    if local.is_file():
        return open_file(local) if "train" in names else None
    if local.suffix in SUFFIXES or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ValueError(f"There is no file or folder {path!r}.{_nearest(local)}")
    try:
        return open_hub_split(path, names)
    except ValueError as error:
        raise ValueError(f"{error}{_nearest(local)}") from error


def _nearest(missing: Path) -> str:
    """A hint with the existing name that is nearest to the first missing part of a path."""
    folder = missing.parent
    while not folder.is_dir():
        folder = folder.parent
    wanted = missing.relative_to(folder).parts[0]
    near = nearest(wanted, (item.name for item in folder.iterdir()))
    return f" Nearest name: {folder / near}." if near else ""


@dataclass(frozen=True)
class Synthetic:
    """Rows made from a seed."""

    dataset: str
    split: str
    seed: int

    @property
    def name(self) -> str:
        return f"{SYNTHETIC}{self.dataset}:{self.split}"

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(synthetic_rows(self.dataset, self.split, self.seed)).encode()).hexdigest()

    def __iter__(self) -> Iterator[RawRow]:
        for number, row in enumerate(synthetic_rows(self.dataset, self.split, self.seed), 1):
            yield RawRow(f"{self.name}:row {number}", row)
