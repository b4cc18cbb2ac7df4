"""Tokenised rows: flat arrays of tokens and target masks, in memory or mapped from the cache.

`TokenStore` holds the rows of one source. `TokenizedRows` is an order over the rows of one or more stores, so that
validation splits and weights cost an index and no copy.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .encode import EncodedRow


@dataclass(frozen=True)
class TokenStore:
    """Rows of one source.

    `tokens` int32 and `mask` bool hold all rows end to end, row i at `offsets[i]:offsets[i + 1]` (int64).
    `answers` (N, 2) int32: the reference answer's place in the row, -1 where there is none.
    Counts: `truncated` rows were cut to the longest length, `dropped` ones lost all their targets by that and are
    left out, `skipped` ones could not be read.
    """

    tokens: np.ndarray
    mask: np.ndarray
    offsets: np.ndarray
    answers: np.ndarray
    truncated: int
    dropped: int
    skipped: int

    ARRAYS = ("tokens", "mask", "offsets", "answers")
    COUNTS = ("truncated", "dropped", "skipped")

    @classmethod
    def from_rows(cls, rows: Sequence[EncodedRow], *, dropped: int = 0, skipped: int = 0) -> "TokenStore":
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row.tokens) for row in rows], out=offsets[1:])
        return cls(
            np.concatenate([np.zeros(0, np.int32), *(row.tokens for row in rows)]),
            np.concatenate([np.zeros(0, np.bool_), *(row.mask for row in rows)]),
            offsets,
            np.array([(row.answer_start, row.answer_stop) for row in rows], np.int32).reshape(-1, 2),
            sum(row.truncated for row in rows) + dropped,
            dropped,
            skipped,
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def digest(self) -> bytes:
        """sha256 of the rows' content."""
        content = hashlib.sha256()
        for name in self.ARRAYS:
            content.update(np.ascontiguousarray(getattr(self, name)).data)
        return content.digest()


class TokenizedRows:
    """Rows to train or evaluate on, by index.

    Args:
        stores: The sources' rows.
        store_of_row, row_in_store: For each row of this set, where it lies.
        tokenizer: Decodes reference answers.
    """

    def __init__(
        self, stores: Sequence[TokenStore], store_of_row: np.ndarray, row_in_store: np.ndarray, tokenizer: Any
    ):
        self._stores = list(stores)
        self._store_of_row = np.asarray(store_of_row, np.int64)
        self._row_in_store = np.asarray(row_in_store, np.int64)
        self._tokenizer = tokenizer
        self.lengths = np.zeros(len(self._row_in_store), np.int32)
        for index, store in enumerate(self._stores):
            mine = self._store_of_row == index
            self.lengths[mine] = np.diff(store.offsets)[self._row_in_store[mine]]

    def require_ids_below(self, num_embeddings: int) -> None:
        """Check every token against the model's embedding, which reads beyond its memory where an id is too large.

        Raises:
            ValueError: A token's id has no row in the embedding.
        """
        for store in self._stores:
            highest = int(store.tokens.max()) if len(store.tokens) else 0
            if highest >= num_embeddings:
                row = int(np.searchsorted(store.offsets, int(store.tokens.argmax()), side="right"))
                raise ValueError(
                    f"Row {row} has the token id {highest}, but the model's embedding has {num_embeddings} rows; the "
                    "tokenizer does not belong to this model."
                )

    @cached_property
    def num_targets(self) -> np.ndarray:
        """Target tokens per row, (N,) int64."""
        counts = np.zeros(len(self), np.int64)
        for index, store in enumerate(self._stores):
            mine = self._store_of_row == index
            if mine.any():
                of_store = np.add.reduceat(store.mask, store.offsets[:-1], dtype=np.int64)
                counts[mine] = of_store[self._row_in_store[mine]]
        return counts

    @property
    def truncated(self) -> int:
        """Rows of the sources that were cut to the longest length."""
        return sum(store.truncated for store in self._stores)

    @property
    def dropped(self) -> int:
        """Rows of the sources that had no target left after the cut and are out."""
        return sum(store.dropped for store in self._stores)

    @property
    def skipped(self) -> int:
        """Rows of the sources that could not be read and were passed over."""
        return sum(store.skipped for store in self._stores)

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the rows' content and order; equal on two machines exactly when their data is."""
        content = hashlib.sha256()
        for store in self._stores:
            content.update(store.digest)
        content.update(self._store_of_row.data)
        content.update(self._row_in_store.data)
        return content.hexdigest()

    def __len__(self) -> int:
        return len(self._row_in_store)

    def tokens(self, index: int) -> np.ndarray:
        """Token ids of a row, (length,) int32."""
        return self._slice("tokens", index)

    def mask(self, index: int) -> np.ndarray:
        """Which of a row's tokens are targets, (length,) bool; the first never is."""
        return self._slice("mask", index)

    def prompt(self, index: int) -> tuple[np.ndarray, str] | None:
        """What to give a model and what it should answer.

        Returns:
            (prompt tokens int32, reference answer without surrounding white space) of a completion or alpaca row,
            or of a chat's last assistant turn; None for text rows and rows whose answer was cut.
        """
        store, row = self._place(index)
        start, stop = store.answers[row]
        if start < 0:
            return None
        tokens = self.tokens(index)
        return tokens[:start], self._tokenizer.decode(tokens[start:stop].tolist()).strip()

    def _place(self, index: int) -> tuple[TokenStore, int]:
        return self._stores[self._store_of_row[index]], int(self._row_in_store[index])

    def _slice(self, name: str, index: int) -> np.ndarray:
        store, row = self._place(index)
        return getattr(store, name)[store.offsets[row] : store.offsets[row + 1]]
