"""Where rows come from: a local file, a folder of splits, a Hugging Face data set, or a generator.

`open_split` finds a split of a source and gives the reader of its rows; nothing is read before it is iterated.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.recipe.config import DataSource
from trainer.recipe.paths import is_local, nearest_path

from .files import SUFFIXES, RawRow, RowFile, open_file
from .hub import open_hub_split
from .synthetic import SPLIT_ROWS, synthetic_rows

VALID_NAMES = ("valid", "validation", "val", "dev")
SYNTHETIC = "synthetic:"


def listed_sources(value: str | list[DataSource], key: str) -> list[DataSource]:
    """`data.train` or `data.valid` as a list; a path alone is one source with the usual settings.

    Args:
        value: The value of a checked recipe.
        key: The recipe's key, for messages.

    Raises:
        ValueError: The list is empty.
    """
    if isinstance(value, str):
        return [DataSource(path=value)]
    if not value:
        raise ValueError(f"{key} is an empty list; give at least one path.")
    return value


def open_split(path: str, names: tuple[str, ...], seed: int) -> RowFile | None:
    """The first of these splits that a source has.

    Args:
        path: `synthetic:NAME`, a file, a folder or a Hugging Face repo.
        names: Split names in order of preference; a single file has only "train".
        seed: Seed of generated rows.

    Returns:
        None when the source has none of them.

    Raises:
        ValueError: There is no such source; the text has the nearest name.
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
    if is_local(path):
        raise ValueError(f"There is no file or folder {path!r}.{_nearest(path)}")
    try:
        return open_hub_split(path, names)
    except ValueError as error:
        raise ValueError(f"{error}{_nearest(path)}") from error


def _nearest(missing: str) -> str:
    """A hint with the existing path that is nearest to a missing one."""
    near = nearest_path(missing)
    return f" Nearest name: {near}." if near else ""


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
