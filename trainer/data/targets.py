"""How many target tokens the micro-batches of a run have at most: one number per padded length, or two.

A compiled step drops the rows that are no targets, and a number of its own for each micro-batch would be a trace of
its own.
"""

from collections.abc import Sequence

import numpy as np

from .plan import PlannedBatch


class TargetBounds:
    """The bounds of one run; the same on every rank.

    Args:
        num_targets: Target tokens per row.
        lengths: Tokens per row.
        plan: The batches of one epoch.
        micro_batch_size: Lines of a micro-batch.
    """

    def __init__(
        self, num_targets: np.ndarray, lengths: np.ndarray, plan: Sequence[PlannedBatch], micro_batch_size: int
    ):
        self.num_targets, self.lengths, self.micro_batch_size = num_targets, lengths, micro_batch_size
        self.usual: dict[int, int] = {}
        if any(batch.num_positions < len(batch.rows) for batch in plan):
            # Packed lines have one length; which documents meet differs from epoch to epoch.
            self.usual[plan[0].length] = max(map(self._most, plan))

    def of(self, batch: PlannedBatch) -> int:
        """At least the targets of every micro-batch of `batch`."""
        length = batch.length
        if length not in self.usual:
            fitting = np.sort(self.num_targets[self.lengths <= length])
            self.usual[length] = int(fitting[-self.micro_batch_size :].sum())
        usual = self.usual[length]
        return usual if self._most(batch) <= usual else self.micro_batch_size * length

    def _most(self, batch: PlannedBatch) -> int:
        micro_batch = batch.positions // self.micro_batch_size
        return int(np.bincount(micro_batch, weights=self.num_targets[batch.rows]).max())
