"""Which rows make up each global batch of an epoch, decided before the first step.

A plan is a pure function of (seed, epoch, row lengths, global batch size): every rank computes the whole of it
and takes its own positions, so global batch k holds the same rows, at the same padded length, on every mesh.
Random order comes from sorting raw PCG64 output, which numpy keeps stable between versions.
Packing (several documents in one row) is planned in `trainer.data.packing`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_LENGTHS = 8
LENGTH_MULTIPLE = 8


@dataclass(frozen=True)
class PlannedBatch:
    """One global batch: `rows[d]` (an index into the tokenised rows) lies in position `positions[d]`.

    Without packing each row has a position of its own. With packing a position holds several rows, in the
    order in which they stand here. `num_positions` counts the positions in use; a batch of fewer than the
    global batch size is the last of its epoch.
    """

    rows: np.ndarray
    length: int
    positions: np.ndarray

    @property
    def num_positions(self) -> int:
        return int(self.positions[-1]) + 1 if len(self.positions) else 0


def random_order(num_items: int, *key: int) -> np.ndarray:
    """A permutation of `range(num_items)` that depends on the integers of `key` alone."""
    generator = np.random.PCG64(np.random.SeedSequence(key))
    return np.argsort(generator.random_raw(num_items), kind="stable")


def bucket_lengths(lengths: Sequence[int] | np.ndarray, max_seq_len: int) -> np.ndarray:
    """The padded lengths, at most eight, that cost these rows the least padding.

    Args:
        lengths: Tokens per row, none above `max_seq_len`.
        max_seq_len: The longest row, which is always the largest bucket, so that other rows of the run (validation)
            fit as well.

    Returns:
        Ascending int64 array: multiples of 8 (of 16, 24, ... above 2048 tokens, to choose from 256 at most) and
        `max_seq_len`. The choice is exact: dynamic programming over "the last bucket is c, k buckets so far".
    """
    step = LENGTH_MULTIPLE * max(1, -(-max_seq_len // (LENGTH_MULTIPLE * 256)))
    candidates = np.append(np.arange(step, max_seq_len, step), max_seq_len)
    num_below = np.searchsorted(np.sort(lengths), candidates, side="right")
    # cost[c] = padded tokens of all rows up to candidate c, with the best buckets so far ending at c
    cost = num_below * candidates
    choices = []
    for _ in range(min(MAX_LENGTHS, len(candidates)) - 1):
        extended = cost[:, None] + (num_below[None, :] - num_below[:, None]) * candidates[None, :]
        extended[np.tril_indices(len(candidates))] = np.iinfo(np.int64).max
        previous = np.argmin(extended, axis=0)
        best = np.take_along_axis(extended, previous[None, :], axis=0)[0]
        better = best < cost
        choices.append(np.where(better, previous, -1))
        cost = np.where(better, best, cost)
    chosen = [len(candidates) - 1]
    for previous in reversed(choices):
        if previous[chosen[-1]] >= 0:
            chosen.append(int(previous[chosen[-1]]))
    return candidates[chosen[::-1]]


def plan_epoch(
    lengths: Sequence[int] | np.ndarray,
    *,
    seed: int,
    epoch: int,
    global_batch_size: int,
    max_seq_len: int,
    shuffle: bool = True,
    group_by_length: bool = True,
    buckets: np.ndarray | None = None,
) -> list[PlannedBatch]:
    """Every global batch of one epoch.

    With `group_by_length` rows of the same bucket share a batch; otherwise batches follow the (shuffled)
    order of the rows. Both off: file order. The incomplete batch, if there is one, comes last.

    Args:
        lengths: Tokens per row.
        seed, epoch: Choose the random order.
        global_batch_size: Rows per batch over all ranks and micro-batches.
        max_seq_len: Longest padded length.
        buckets: Padded lengths to use, ascending; those of `bucket_lengths(lengths, max_seq_len)` by default.
            Pass the training rows' buckets when planning validation, so that a run keeps to eight shapes.

    Raises:
        ValueError: There are no rows or the batch size is below 1.
    """
    lengths = np.asarray(lengths)
    if len(lengths) == 0:
        raise ValueError("There are no rows to plan batches from.")
    if global_batch_size < 1:
        raise ValueError(f"The global batch size is {global_batch_size}; it must be at least 1.")
    if buckets is None:
        buckets = bucket_lengths(lengths, max_seq_len)
    order = random_order(len(lengths), seed, epoch) if shuffle else np.arange(len(lengths))
    if group_by_length:
        batches = _grouped(order, np.searchsorted(buckets, lengths), global_batch_size, shuffle, seed, epoch)
    else:
        batches = np.split(order, np.arange(global_batch_size, len(order), global_batch_size))
    return [
        PlannedBatch(rows, int(buckets[np.searchsorted(buckets, lengths[rows].max())]), np.arange(len(rows)))
        for rows in batches
    ]


def _grouped(
    order: np.ndarray, bucket_of_row: np.ndarray, size: int, shuffle: bool, seed: int, epoch: int
) -> list[np.ndarray]:
    """Chunks of rows of (almost always) one bucket, the incomplete chunk last."""
    by_length = order[np.argsort(bucket_of_row[order], kind="stable")]
    num_full, num_left = divmod(len(order), size)
    # The incomplete batch is cut out at a random chunk: always at the end would make it the longest rows each epoch.
    cut = int(random_order(num_full + 1, seed, epoch, 1)[0]) * size if shuffle else num_full * size
    full = np.concatenate([by_length[:cut], by_length[cut + num_left :]]).reshape(num_full, size)
    batch_order = random_order(num_full, seed, epoch, 2) if shuffle else np.argsort(full.min(axis=1), kind="stable")
    left = by_length[cut : cut + num_left]
    return [*full[batch_order], *([left] if num_left else [])]
