"""The batch plan: pure, complete, the same on every mesh, and in few shapes."""

from itertools import combinations

import numpy as np
import pytest

from trainer.data import bucket_lengths, plan_epoch

LENGTHS = np.random.RandomState(0).randint(5, 400, 237)


def plan(lengths=LENGTHS, **changes):
    options = {"seed": 1, "epoch": 0, "global_batch_size": 8, "max_seq_len": 400}
    return plan_epoch(lengths, **options | changes)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("group_by_length", [True, False])
def test_every_row_once_and_only_the_last_batch_short(shuffle, group_by_length):
    """Catches rows lost or repeated at bucket borders, and a short batch in the middle of an epoch."""
    batches = plan(shuffle=shuffle, group_by_length=group_by_length)
    assert sorted(np.concatenate([batch.rows for batch in batches])) == list(range(len(LENGTHS)))
    assert [len(batch.rows) for batch in batches] == [8] * 29 + [5]
    assert all(LENGTHS[batch.rows].max() <= batch.length for batch in batches)


def test_plan_is_a_function_of_its_arguments():
    """Catches hidden state (a shared generator): ranks and resumed runs would see other batches."""
    first = plan()
    plan(seed=9)
    second = plan()
    assert all(np.array_equal(a.rows, b.rows) and a.length == b.length for a, b in zip(first, second, strict=True))


def test_epochs_and_seeds_differ():
    """Catches an epoch or seed that is ignored."""
    orders = [np.concatenate([batch.rows for batch in plan(seed=seed, epoch=epoch)])
              for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])


def test_known_plan():
    """Catches a change of the random order: resumed runs of older checkpoints would repeat or miss rows."""
    batches = plan_epoch([3, 9, 4, 8, 5, 7, 6], seed=0, epoch=0, global_batch_size=2, max_seq_len=16,
                         group_by_length=False)
    assert [batch.rows.tolist() for batch in batches] == [[3, 2], [1, 6], [0, 4], [5]]
    assert {batch.length for batch in batches} <= {8, 16}


def test_no_shuffle_no_grouping_is_file_order():
    """Catches any reordering where the recipe asks for none; parity with other trainers needs it."""
    order = np.concatenate([batch.rows for batch in plan(shuffle=False, group_by_length=False)])
    assert np.array_equal(order, np.arange(len(LENGTHS)))


def test_at_most_eight_lengths_even_with_validation():
    """Catches a shape per batch: each costs a trace that a compiled step keeps for ever."""
    buckets = bucket_lengths(LENGTHS, 512)
    validation = plan(np.arange(1, 513), max_seq_len=512, buckets=buckets)
    shapes = {batch.length for batch in plan(max_seq_len=512) + validation}
    assert len(buckets) <= 8 and buckets[-1] == 512
    assert shapes <= set(buckets.tolist())


def test_buckets_are_the_cheapest():
    """Catches a wrong recurrence: compared with trying every choice of buckets."""
    lengths = np.array([3, 5, 17, 18, 30, 33, 33, 60, 61, 90])
    candidates = np.arange(8, 97, 8)

    def cost(buckets):
        return np.asarray(buckets)[np.searchsorted(buckets, lengths)].sum()

    best = min(cost([*chosen, 96]) for k in range(8) for chosen in combinations(candidates[:-1], k))
    assert cost(bucket_lengths(lengths, 96)) == best


def test_grouping_pays():
    """Catches a length sort that does nothing: padding would stay as in random batches."""
    def padding(batches):
        return 1 - LENGTHS.sum() / sum(batch.length * len(batch.rows) for batch in batches)

    assert padding(plan()) < 0.12 < 0.25 < padding(plan(group_by_length=False))


def test_short_batch_is_not_always_the_longest_rows():
    """Catches a bias: the incomplete batch, with the fewest rows, must not hold the same rows each epoch."""
    lengths = [plan(epoch=epoch)[-1].length for epoch in range(12)]
    assert len(set(lengths)) > 2


@pytest.mark.parametrize("max_seq_len", [1, 7, 8, 100, 2048, 5000, 131072])
def test_any_longest_length_works(max_seq_len):
    """Catches off-by-one at lengths that are no multiple, and a table that grows with the square of the length."""
    lengths = np.unique(np.linspace(1, max_seq_len, 50).astype(int))
    buckets = bucket_lengths(lengths, max_seq_len)
    assert buckets[-1] == max_seq_len and len(buckets) <= 8
    assert np.all(np.diff(buckets) > 0)


def test_refusals():
    """Catches an empty plan passed on silently."""
    with pytest.raises(ValueError, match="no rows"):
        plan([])
    with pytest.raises(ValueError, match="batch size is 0"):
        plan(global_batch_size=0)
