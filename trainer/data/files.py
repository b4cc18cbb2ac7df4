"""Files of rows: JSON lines, CSV and parquet.

A reader yields every row with its place (file and line), also the rows it cannot read, and has a digest of its
content. Nothing is parsed before it is iterated; `pyarrow` is imported only for parquet.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

SUFFIXES = (".jsonl", ".parquet", ".csv")


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
class LocalFile:
    """The rows of one file.

    Args:
        path: The file.
        read: Yields the file's rows.
    """

    path: Path
    read: Callable[[Path], Iterator[RawRow]]

    @property
    def name(self) -> str:
        return str(self.path)

    def digest(self) -> str:
        return file_digest(self.path)

    def __iter__(self) -> Iterator[RawRow]:
        return self.read(self.path)


def open_file(path: Path) -> RowFile:
    """The rows of a file, read as its suffix says.

    Raises:
        ValueError: There is no reader for the suffix.
    """
    readers = {".jsonl": read_json_lines, ".parquet": read_parquet, ".csv": read_csv}
    if path.suffix not in readers:
        raise ValueError(f"{path} is not one of the files that can be read: {', '.join(SUFFIXES)}.")
    return LocalFile(path, readers[path.suffix])


def read_json_lines(path: Path) -> Iterator[RawRow]:
    """One JSON object a line; empty lines are passed over."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            place = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield RawRow(place, None, f"not JSON ({error})")
                continue
            if isinstance(row, dict):
                yield RawRow(place, row)
            else:
                yield RawRow(place, None, f"a row must be a JSON object, not {type(row).__name__}")


def read_csv(path: Path) -> Iterator[RawRow]:
    """Comma-separated values under a header line; cells may span lines."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = _Lines(file)
        reader = csv.DictReader(lines)
        try:
            for row in reader:
                place, first_line = f"{path}:{reader.line_num}", reader.line_num - len(lines.taken) + 1
                if _is_open(lines):
                    yield RawRow(f"{path}:{first_line}", None, "a quotation mark that opens in this row is never closed")
                elif None in row or None in row.values():
                    num_cells = len(reader.fieldnames or ())
                    yield RawRow(place, None, f"the header has {num_cells} cells, this row has not")
                else:
                    yield RawRow(place, row)
                lines.taken.clear()
        except (UnicodeDecodeError, csv.Error) as error:  # what follows cannot be told apart into rows
            yield RawRow(f"{path}:{reader.line_num + 1}", None, f"not CSV in UTF-8 ({error})")


class _Lines:
    """The lines of a file, of which those of the present row are kept."""

    def __init__(self, file: Iterable[str]):
        self.taken: list[str] = []
        self.at_end = False
        self._file = iter(file)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            self.taken.append(next(self._file))
        except StopIteration:
            self.at_end = True
            raise
        return self.taken[-1]


def _is_open(lines: _Lines) -> bool:
    """Whether the row takes all the rest of the file, looking for the end of a cell."""
    if not lines.at_end:
        return False
    try:
        list(csv.reader(lines.taken, strict=True))
    except csv.Error as error:
        return "unexpected end of data" in str(error)
    return False


def read_parquet(path: Path) -> Iterator[RawRow]:
    """A parquet file, read one batch of rows at a time."""
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield RawRow(f"{path}:row {number}", row)
    except (pyarrow.ArrowException, OSError) as error:
        yield RawRow(f"{path}:row {number + 1}", None, f"not parquet ({error})")


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
