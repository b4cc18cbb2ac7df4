"""Where rows come from: a local file, a folder of splits, a Hugging Face data set, or a generator.

Opening a source gives `RowFile`s: each yields its rows with their place (file and line) and has a digest of its
content. Nothing is parsed before it is iterated; `datasets` and `pyarrow` are imported only where needed.
"""

import csv
import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from .synthetic import SPLIT_ROWS, synthetic_rows

VALID_NAMES = ("valid", "validation", "val", "dev")
SUFFIXES = (".jsonl", ".parquet", ".csv")
SYNTHETIC = "synthetic:"


class RawRow(NamedTuple):
    """A row and its place; `row` is None where it cannot be read, for `reason`."""

    place: str
    row: Mapping[str, Any] | None
    reason: str = ""


class RowFile(Protocol):
    """The rows of one split of one source."""

    @property
    def name(self) -> str: ...

    def digest(self) -> str:
        """A hash that changes with the content."""
        ...

    def __iter__(self) -> Iterator[RawRow]: ...


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
        value: a path, a `{path, split, weight, format, columns}` mapping, or a list of either.
        key: the recipe key, for messages.

    Raises:
        ValueError: for unknown keys, a missing path or a weight that is not positive.
    """
    entries = [value] if isinstance(value, (str, Mapping)) else list(value)
    if not entries:
        raise ValueError(f"{key} is an empty list; give at least one path.")
    sources = []
    for position, entry in enumerate(entries):
        entry = {"path": entry} if isinstance(entry, str) else dict(entry)
        allowed = list(Source.__dataclass_fields__)
        if unknown := [name for name in entry if name not in allowed]:
            near = difflib.get_close_matches(unknown[0], allowed, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
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
    raise ValueError(unknown_path(path, local))


def open_file(path: Path) -> RowFile:
    """The reader for a file's suffix.

    Raises:
        ValueError: when there is none.
    """
    readers = {".jsonl": JsonLines, ".parquet": Parquet, ".csv": Csv}
    if path.suffix not in readers:
        raise ValueError(f"{path} is not one of the files that can be read: {', '.join(SUFFIXES)}.")
    return readers[path.suffix](path)


def unknown_path(path: str, local: Path) -> str:
    """The message for a path that leads nowhere, with what lies nearby."""
    folder = local.parent
    while not folder.is_dir():
        folder = folder.parent
    wanted = local.relative_to(folder).parts[0]
    near = difflib.get_close_matches(wanted, [item.name for item in folder.iterdir()], n=1)
    hint = f" Nearest name in {folder}: {near[0]}." if near else ""
    return f"There is no file, folder or data set {path!r}.{hint}"


@dataclass(frozen=True)
class JsonLines:
    """One JSON object a line; empty lines are passed over."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    def digest(self) -> str:
        return file_digest(self.path)

    def __iter__(self) -> Iterator[RawRow]:
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                place = f"{self.path}:{number}"
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    yield RawRow(place, None, f"not JSON ({error})")
                    continue
                if isinstance(row, dict):
                    yield RawRow(place, row)
                else:
                    yield RawRow(place, None, f"a row must be a JSON object, not {type(row).__name__}")


@dataclass(frozen=True)
class Csv:
    """Comma-separated values under a header line; cells may span lines."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    def digest(self) -> str:
        return file_digest(self.path)

    def __iter__(self) -> Iterator[RawRow]:
        with self.path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines)
            for row in reader:
                place = f"{self.path}:{reader.line_num}"
                if None in row or None in row.values():
                    yield RawRow(place, None, f"the header has {len(reader.fieldnames or ())} cells, this row has not")
                else:
                    yield RawRow(place, row)


@dataclass(frozen=True)
class Parquet:
    """A parquet file, read one batch of rows at a time."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    def digest(self) -> str:
        return file_digest(self.path)

    def __iter__(self) -> Iterator[RawRow]:
        import pyarrow.parquet

        number = 0
        with pyarrow.parquet.ParquetFile(self.path) as table:
            for batch in table.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield RawRow(f"{self.path}:row {number}", row)


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


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
