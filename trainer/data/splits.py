"""From `data:` of a recipe to the tokenised rows of training and validation.

Sources are read and tokenised one by one (through the cache), then cut into training and validation rows and
weighted. Everything depends on the files, the tokenizer, the recipe and the seed alone, so every rank gets the
same rows.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .cache import cache_folder, cache_key, cached_store, tokenizer_digest
from .encode import EncodedRow, encode_documents
from .files import RowFile
from .formats import BadRow, Document, detect_format, render, resolve_loss_on
from .plan import random_order
from .rows import TokenizedRows, TokenStore
from .sources import VALID_NAMES, Source, open_split, parse_sources

ROWS_AT_ONCE = 1000
MAX_LISTED = 10


class DataConfig(Protocol):
    """The part of a recipe's `data:` that is read here."""

    train: Any
    valid: Any
    val_fraction: float
    format: str
    max_seq_len: int
    loss_on: str
    on_bad_row: str


@dataclass(frozen=True)
class RowSequences:
    """How a row becomes the sequences that are trained.

    Attributes:
        name: Of the way; tokens are cached under it.
        of_row: From an encoded row to its sequences.
    """

    name: str
    of_row: Callable[[EncodedRow], Sequence[EncodedRow]]


@dataclass(frozen=True)
class Splits:
    """Training rows, and validation rows where there are any."""

    train: TokenizedRows
    valid: TokenizedRows | None


def load_splits(
    data: DataConfig,
    tokenizer: Any,
    seed: int,
    *,
    cache_dir: str | Path | None = None,
    notice: Callable[[str], None] = print,
    sequences: RowSequences | None = None,
) -> Splits:
    """Training and validation rows.

    Validation is `data.valid`, or else the split of that name beside the training rows, or else the last
    `data.val_fraction` of each source's rows in file order.

    Args:
        data: the recipe's `data:`.
        tokenizer: a transformers tokenizer or mlx-lm's wrapper of one.
        seed: for generated rows and the choice of rows by fractional weights.
        cache_dir: folder for tokenised rows; `MLX_TRAINER_CACHE` or `~/.cache/mlx-trainer` by default.
        notice: takes one line about what was cut or passed over.
        sequences: How a row becomes sequences. Default: it is one.

    Raises:
        ValueError: for sources that are not there, rows that cannot be used, and empty splits.
    """
    reader = _Reader(data, tokenizer, seed, cache_dir, notice, sequences)
    train, valid = [], []
    for source in parse_sources(data.train, "data.train"):
        store = reader.read(source, (source.split or "train",))
        names = tuple(name for name in VALID_NAMES if name != source.split)  # never validate on what is trained on
        held_out = None if data.valid is not None else reader.read_if_there(source, names)
        num_valid = 0
        if held_out is not None:
            valid.append(_Part(held_out, 0, len(held_out)))
        elif data.valid is None and data.val_fraction > 0:
            num_valid = min(max(1, round(len(store) * data.val_fraction)), len(store))
            valid.append(_Part(store, len(store) - num_valid, len(store)))
        train.append(_Part(store, 0, len(store) - num_valid, source.weight))
    if data.valid is not None:
        for source in parse_sources(data.valid, "data.valid"):
            store = reader.read(source, (source.split,) if source.split else (*VALID_NAMES, "train"))
            valid.append(_Part(store, 0, len(store), source.weight))
    rows = _mix(train, seed, tokenizer)
    if len(rows) == 0:
        raise ValueError(f"data.val_fraction: {data.val_fraction} leaves no training rows.")
    return Splits(rows, _mix(valid, seed, tokenizer) if valid else None)


def load_split(
    data: DataConfig,
    tokenizer: Any,
    seed: int,
    split: str,
    *,
    cache_dir: str | Path | None = None,
    notice: Callable[[str], None] = print,
) -> TokenizedRows:
    """The rows of one split by name: "train" and "valid" as `load_splits` makes them, others as the source has them.

    Raises:
        ValueError: when there is no such split.
    """
    if split in ("train", *VALID_NAMES):
        splits = load_splits(data, tokenizer, seed, cache_dir=cache_dir, notice=notice)
        rows = splits.train if split == "train" else splits.valid
        if rows is None:
            raise ValueError("There is no validation split: data.valid is null, none was found and val_fraction is 0.")
        return rows
    reader = _Reader(data, tokenizer, seed, cache_dir, notice)
    stores = [reader.read(source, (split,)) for source in parse_sources(data.train, "data.train")]
    return _mix([_Part(store, 0, len(store)) for store in stores], seed, tokenizer)


@dataclass(frozen=True)
class _Part:
    """Rows `[start, stop)` of a store, each `weight` times an epoch."""

    store: TokenStore
    start: int
    stop: int
    weight: float = 1.0

    def rows(self, seed: int, position: int) -> np.ndarray:
        """Whole copies in file order, then the fractional rest: rows chosen by the seed, in file order."""
        rows = np.arange(self.start, self.stop)
        copies = int(self.weight)
        num_extra = round((self.weight - copies) * len(rows))
        extra = np.sort(random_order(len(rows), seed, position)[:num_extra])
        return np.concatenate([*[rows] * copies, rows[extra]])


def _mix(parts: list[_Part], seed: int, tokenizer: Any) -> TokenizedRows:
    rows = [part.rows(seed, position) for position, part in enumerate(parts)]
    stores = np.repeat(np.arange(len(parts)), [len(chosen) for chosen in rows])
    return TokenizedRows([part.store for part in parts], stores, np.concatenate(rows), tokenizer)


@dataclass(frozen=True)
class _Reader:
    """Sources to stores of token rows."""

    data: DataConfig
    tokenizer: Any
    seed: int
    cache_dir: str | Path | None
    notice: Callable[[str], None]
    sequences: RowSequences | None = None

    def read(self, source: Source, names: tuple[str, ...]) -> TokenStore:
        store = self.read_if_there(source, names)
        if store is None:
            raise ValueError(f"{source.path} has no split {' or '.join(names)}.")
        return store

    def read_if_there(self, source: Source, names: tuple[str, ...]) -> TokenStore | None:
        file = open_split(source.path, names, self.seed)
        if file is None:
            return None
        key = cache_key(
            rows=file.digest(),
            tokenizer=tokenizer_digest(self.tokenizer),
            format=source.format or self.data.format,
            columns=dict(source.columns),
            loss_on=self.data.loss_on,
            max_seq_len=self.data.max_seq_len,
            on_bad_row=self.data.on_bad_row,
            **({"sequences": self.sequences.name} if self.sequences else {}),
        )
        folder = cache_folder(self.cache_dir)
        store = cached_store(folder, key, lambda: self._tokenise(file, source), self.notice)
        self._tell(store, file.name)
        return store

    def _tell(self, store: TokenStore, name: str) -> None:
        if len(store) == 0:
            lost = f"{store.skipped} unreadable, {store.dropped} without a target in {self.data.max_seq_len} tokens"
            raise ValueError(f"{name} has no rows to use{f' ({lost})' if store.skipped or store.dropped else ''}.")
        if store.skipped:
            self.notice(f"{name}: {store.skipped} rows could not be read and were skipped")
        if store.truncated:
            dropped = f"; {store.dropped} of them had no target left and are out" if store.dropped else ""
            self.notice(f"{name}: {store.truncated} rows cut to {self.data.max_seq_len} tokens{dropped}")

    def _tokenise(self, file: RowFile, source: Source) -> TokenStore:
        kept: list[EncodedRow] = []
        dropped = 0
        problems = _Problems(skip=self.data.on_bad_row == "skip")
        for chunk, loss_on in self._documents(file, source, problems):
            places, documents = zip(*chunk)
            encoded = encode_documents(
                documents, self.tokenizer, loss_on=loss_on, max_seq_len=self.data.max_seq_len
            )
            for place, row in zip(places, encoded):
                if row.mask.any():
                    kept += self.sequences.of_row(row) if self.sequences else (row,)
                elif row.truncated:
                    dropped += 1
                else:
                    problems.add(place, f"has no target tokens with loss_on: {loss_on}")
        problems.stop()
        return TokenStore.from_rows(kept, dropped=dropped, skipped=problems.count)

    def _documents(
        self, file: RowFile, source: Source, problems: "_Problems"
    ) -> Iterator[tuple[list[tuple[str, Document]], str]]:
        """Rendered rows with their places, a thousand at a time, and what of them is trained on."""
        format = source.format or self.data.format
        loss_on = None
        chunk: list[tuple[str, Document]] = []
        for place, row, reason in file:
            if row is None:
                problems.add(place, reason)
                continue
            if loss_on is None:
                format = detect_format(row, source.columns) if format == "auto" else format
                loss_on = resolve_loss_on(self.data.loss_on, format)
            try:
                spans = loss_on in ("assistant", "completion")
                chunk.append((place, render(row, format, source.columns, self.tokenizer, spans)))
            except BadRow as error:
                problems.add(place, str(error))
            if len(chunk) == ROWS_AT_ONCE:
                yield chunk, loss_on
                chunk = []
        if chunk:
            yield chunk, loss_on


class BadRows(ValueError):
    """Rows that cannot be used; `lines` gives the place of each and the reason, of ten at most."""

    def __init__(self, lines: Sequence[str]):
        more = " (there may be more)" if len(lines) == MAX_LISTED else ""
        listed = "\n".join(f"  {line}" for line in lines)
        super().__init__(f"Rows that cannot be used{more}; data.on_bad_row: skip leaves them out:\n{listed}")
        self.lines = list(lines)


class _Problems:
    """Bad rows: counted when they are to be skipped, else listed and raised together."""

    def __init__(self, skip: bool):
        self.count = 0
        self._skip = skip
        self._lines: list[str] = []

    def add(self, place: str, reason: str) -> None:
        self.count += 1
        self._lines.append(f"{place}: {reason}")
        if len(self._lines) == MAX_LISTED:
            self.stop()

    def stop(self) -> None:
        """Raise what has been found, unless bad rows are skipped."""
        if self._lines and not self._skip:
            raise BadRows(self._lines)
        self._lines.clear()
