"""Rows of tokens to the arrays of one micro-batch."""

from typing import Protocol

import numpy as np

from .plan import PlannedBatch


class Rows(Protocol):
    """What collating needs of the tokenised rows."""

    def tokens(self, index: int) -> np.ndarray: ...

    def mask(self, index: int) -> np.ndarray: ...


def collate(rows: Rows, batch: PlannedBatch, positions: slice, pad_id: int) -> dict[str, np.ndarray]:
    """The arrays of some positions of a global batch.

    Args:
        rows: The tokenised rows that the plan indexes.
        batch: One batch of `plan_epoch` or `plan_packed`.
        positions: `slice(start, stop)` of the global batch: one rank's micro-batch. Positions past the last
            planned one become empty rows (all padding), so every rank has the same shapes.
        pad_id: Token written where there is no row.

    Returns:
        `{"tokens": (B, L) int32, "mask": (B, L) bool, "segments": (B, L) int32}` with B = stop - start and
        L = batch.length. The mask marks loss targets, never a document's first token. Segments number the
        documents of a position 1, 2, ...; 0 is padding.
    """
    shape = (positions.stop - positions.start, batch.length)
    arrays = {
        "tokens": np.full(shape, pad_id, np.int32),
        "mask": np.zeros(shape, np.bool_),
        "segments": np.zeros(shape, np.int32),
    }
    filled = np.zeros(shape[0], np.int64)
    num_documents = np.zeros(shape[0], np.int32)
    mine = np.flatnonzero((batch.positions >= positions.start) & (batch.positions < positions.stop))
    for document in mine:
        line = int(batch.positions[document]) - positions.start
        tokens = rows.tokens(int(batch.rows[document]))
        start, stop = filled[line], filled[line] + len(tokens)
        num_documents[line] += 1
        arrays["tokens"][line, start:stop] = tokens
        arrays["mask"][line, start:stop] = rows.mask(int(batch.rows[document]))
        arrays["segments"][line, start:stop] = num_documents[line]
        filled[line] = stop
    return arrays
