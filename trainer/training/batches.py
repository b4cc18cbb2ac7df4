"""From the batch plan to this rank's micro-batches: what is read, when, and the dropout keys of each row.

Global batch k holds the same rows on every mesh; data-parallel ranks and micro-batches only divide its slots.
Arrays are made in a background thread one step ahead (NumPy only; MLX stays in the main thread).
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from trainer.data import PlannedBatch, TargetBounds, TokenizedRows, collate


@dataclass(frozen=True)
class Share:
    """How one data-parallel rank takes part in a global batch.

    Attributes:
        rank: Index among the data-parallel ranks.
        size: Number of data-parallel ranks.
        micro_batch_size: Rows of one micro-batch.
        accumulation: Micro-batches per step.
    """

    rank: int
    size: int
    micro_batch_size: int
    accumulation: int

    @property
    def global_batch_size(self) -> int:
        """Rows of one step over all ranks."""
        return self.size * self.micro_batch_size * self.accumulation

    def slots(self, micro_batch: int) -> slice:
        """Positions in the global batch that micro-batch number `micro_batch` of this rank holds."""
        start = (micro_batch * self.size + self.rank) * self.micro_batch_size
        return slice(start, start + self.micro_batch_size)


@dataclass(frozen=True)
class StepData:
    """One step's input on this rank.

    Attributes:
        epoch: Number of the pass over the rows, from 0.
        position: Index of the global batch inside the epoch.
        num_tokens: Real (non-padding) tokens of the global batch, all ranks.
        num_slots: Token slots of the global batch, padding included.
        num_rows: Rows (documents) of the global batch.
        micro_batches: Arrays of this rank's micro-batches, and `max_targets`, the most targets of one of this shape.
    """

    epoch: int
    position: int
    num_tokens: int
    num_slots: int
    num_rows: int
    micro_batches: list[dict[str, np.ndarray | int]]

    def arrays(self) -> list[dict[str, mx.array | int]]:
        """The micro-batches as MLX arrays; numbers stay Python's."""
        as_array = lambda value: mx.array(value) if isinstance(value, np.ndarray) else value  # noqa: E731
        return [{name: as_array(value) for name, value in batch.items()} for batch in self.micro_batches]


class TrainingBatches:
    """The sequence of steps of a run.

    Args:
        rows: Tokenised training rows.
        planner: `planner(epoch) -> list[PlannedBatch]`, pure.
        share: This rank's part of each global batch.
        seed: Decides the dropout keys.
        pad_id: Token that fills rows up.
    """

    def __init__(self, rows: TokenizedRows, planner: Any, share: Share, seed: int, pad_id: int):
        self.rows, self.planner, self.share, self.seed, self.pad_id = rows, planner, share, seed, pad_id
        self.epoch, self.plan = 0, planner(0)
        self.bounds = TargetBounds(rows.num_targets, rows.lengths, self.plan, share.micro_batch_size)

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in one pass over the rows."""
        return len(self.plan)

    def make(self, step: int) -> StepData:
        """Input of step number `step` (from 0): a pure function of the plan, the share and the seed."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.epoch, self.plan = epoch, self.planner(epoch)
        planned = self.plan[position]
        keys = row_keys(self.seed, step, self.share.global_batch_size)
        max_targets = self.bounds.of(planned)
        micro_batches: list[dict[str, np.ndarray | int]] = []
        for index in range(self.share.accumulation):
            slots = self.share.slots(index)
            batch: dict[str, np.ndarray | int] = dict(collate(self.rows, planned, slots, self.pad_id))
            micro_batches.append(batch | {"keys": keys[slots], "max_targets": max_targets})
        return StepData(
            epoch=epoch,
            position=position,
            num_tokens=int(np.minimum(self.rows.lengths[planned.rows], planned.length).sum()),
            num_slots=self.share.global_batch_size * planned.length,
            num_rows=len(planned.rows),
            micro_batches=micro_batches,
        )

    def steps(self, start: int, stop: int) -> Iterator[StepData]:
        """Inputs of the steps from `start` to `stop` (excluded), each made while the one before is in use."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as pool:
            ahead = [pool.submit(self.make, start)] if start < stop else []
            for step in range(start, stop):
                data = ahead.pop().result()
                ahead = [pool.submit(self.make, step + 1)] if step + 1 < stop else []
                yield data


def evaluation_batches(
    rows: TokenizedRows, plan: list[PlannedBatch], share: Share, pad_id: int
) -> Iterator[dict[str, mx.array]]:
    """This rank's part of a validation plan, in order, as MLX arrays; `share.accumulation` must be 1."""
    for planned in plan:
        batch = collate(rows, planned, share.slots(0), pad_id)
        batch["keys"] = np.zeros((share.micro_batch_size, 2), dtype=np.uint32)
        yield {name: mx.array(value) for name, value in batch.items()}


def row_keys(seed: int, step: int, num_rows: int) -> np.ndarray:
    """Dropout keys `(num_rows, 2)` uint32 of one global batch."""
    return np.random.Generator(np.random.PCG64([seed, step])).integers(0, 2**32, (num_rows, 2), dtype=np.uint32)
