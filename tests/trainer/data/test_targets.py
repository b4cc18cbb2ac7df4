"""Bounds on the targets of micro-batches: never too small, and few."""

import numpy as np
import pytest

from trainer.data import TargetBounds, bucket_lengths, plan_epoch, plan_packed
from trainer.data.encode import EncodedRow
from trainer.data.rows import TokenizedRows, TokenStore

MICRO, GLOBAL, LONGEST = 2, 8, 256


@pytest.fixture(scope="module")
def rows():
    """Prompts and answers as long as those of a question-to-SQL set, a few of them far longer."""
    random = np.random.RandomState(0)
    num_answer = np.clip(random.lognormal(2.7, 0.5, 600).astype(int), 2, 120)
    lengths = num_answer + np.clip(random.lognormal(4.0, 0.35, 600).astype(int), 5, 130)
    return lengths, num_answer


def batches_of(lengths, epoch, packed, **options):
    options |= {"seed": 1, "epoch": epoch, "global_batch_size": GLOBAL, "max_seq_len": LONGEST}
    return plan_packed(lengths, **options) if packed else plan_epoch(lengths, **options)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("group_by_length", [False, True])
def test_bounds_hold_and_are_few(rows, packed, group_by_length):
    """Catches a bound that drops targets from the loss, and a shape (or a trace) per batch: four epochs, validation
    on other rows included.
    """
    lengths, num_targets = rows
    options = {} if packed else {"group_by_length": group_by_length, "buckets": bucket_lengths(lengths, LONGEST)}
    bounds = TargetBounds(num_targets, lengths, batches_of(lengths, 0, packed, **options), MICRO)
    traces, shapes = set(), set()
    for epoch in range(4):
        for batch in batches_of(lengths, epoch, packed, **options):
            targets = np.bincount(batch.positions // MICRO, weights=num_targets[batch.rows])
            assert targets.max() <= bounds.of(batch) <= MICRO * batch.length
            traces.add((batch.length, bounds.of(batch)))
    shapes |= {length for length, _ in traces}
    shapes |= {batch.length for batch in batches_of(np.arange(2, LONGEST), 0, packed, shuffle=False, **options)}
    assert len(traces) <= 8 and len(shapes) <= 8


def test_bounds_are_of_use(rows):
    """Catches a bound that keeps every token of a packed line: answers are a fifth of these rows."""
    lengths, num_targets = rows
    plan = batches_of(lengths, 0, packed=True)
    bounds = TargetBounds(num_targets, lengths, plan, MICRO)
    assert np.mean([bounds.of(batch) for batch in plan]) < MICRO * LONGEST / 2


def test_targets_of_rows_are_counted():
    """Catches counts that belong to other rows: an order over two stores."""
    stores = []
    for first in (1, 4):
        masks = [np.arange(6) < first + i for i in range(2)]
        encoded = [EncodedRow(np.zeros(6, np.int32), mask, -1, -1, False) for mask in masks]
        stores.append(TokenStore.from_rows(encoded))
    found = TokenizedRows(stores, np.array([1, 0, 0, 1]), np.array([1, 0, 1, 0]), None)
    assert found.num_targets.tolist() == [5, 1, 2, 4]
