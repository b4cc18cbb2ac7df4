"""From planned rows to arrays."""

import numpy as np

from trainer.data import PlannedBatch, collate, plan_epoch


class FewRows:
    """Row i is i + 2 tokens of value 10 + i, all but the first a target."""

    def tokens(self, index):
        return np.full(index + 2, 10 + index, np.int32)

    def mask(self, index):
        return np.arange(index + 2) > 0


def test_one_row_per_position():
    """Catches rows shifted, masks without their row, and padding that counts as a target."""
    batch = PlannedBatch(np.array([1, 0]), 4, np.arange(2))
    arrays = collate(FewRows(), batch, slice(0, 2), pad_id=7)
    assert arrays["tokens"].tolist() == [[11, 11, 11, 7], [10, 10, 7, 7]]
    assert arrays["mask"].tolist() == [[False, True, True, False], [False, True, False, False]]
    assert arrays["segments"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert [arrays[name].dtype for name in ("tokens", "mask", "segments")] == [np.int32, np.bool_, np.int32]


def test_positions_past_the_plan_are_empty_rows():
    """Catches ranks with other shapes than their peers in the last batch of an epoch."""
    batch = PlannedBatch(np.array([3]), 8, np.arange(1))
    arrays = collate(FewRows(), batch, slice(2, 4), pad_id=7)
    assert arrays["tokens"].shape == (2, 8)
    assert (arrays["tokens"] == 7).all() and not arrays["mask"].any() and not arrays["segments"].any()


def test_slices_make_up_the_whole():
    """Catches a batch that depends on how ranks and micro-batches divide it."""
    for batch in plan_epoch(np.arange(10) + 2, seed=0, epoch=0, global_batch_size=4, max_seq_len=16):
        whole = collate(FewRows(), batch, slice(0, 4), pad_id=0)
        parts = [collate(FewRows(), batch, slice(start, start + 1), pad_id=0) for start in range(4)]
        for name, array in whole.items():
            assert np.array_equal(array, np.concatenate([part[name] for part in parts]))
