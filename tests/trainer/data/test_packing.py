"""Packing: every document once, nothing over the edge, the same on every mesh, little padding."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from data_support import config
from trainer.data import build_tokenizer, collate, corpus, load_splits, plan_epoch, plan_packed
from trainer.data.packing import _best_fill

LENGTHS = np.random.RandomState(0).randint(3, 200, 500)
WIKISQL = Path(__file__).parents[4] / "shared/data/wikisql"


def plan(lengths=LENGTHS, **changes):
    options = {"seed": 1, "epoch": 0, "global_batch_size": 4, "max_seq_len": 256}
    return plan_packed(lengths, **options | changes)


class Numbered:
    """Row i is its number repeated, the first token no target."""

    def tokens(self, index):
        return np.full(LENGTHS[index], index + 1000, np.int32)

    def mask(self, index):
        return np.arange(LENGTHS[index]) > 0


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_document_once_within_its_line(shuffle):
    """Catches documents lost, repeated or cut, and lines of more tokens than they hold."""
    batches = plan(shuffle=shuffle)
    assert sorted(np.concatenate([batch.rows for batch in batches])) == list(range(len(LENGTHS)))
    assert [batch.num_positions for batch in batches[:-1]] == [4] * (len(batches) - 1)
    for batch in batches:
        assert np.bincount(batch.positions, LENGTHS[batch.rows]).max() <= batch.length == 256


def test_collated_segments_are_the_documents():
    """Catches documents that overlap, run on into each other's segment, or lose a target."""
    for batch in plan():
        arrays = collate(Numbered(), batch, slice(0, 4), pad_id=0)
        for line in range(4):
            mine = batch.rows[batch.positions == line]
            tokens, segments = arrays["tokens"][line], arrays["segments"][line]
            assert [set(tokens[segments == number + 1]) for number in range(len(mine))] == [
                {row + 1000} for row in mine]
            assert np.bincount(segments, minlength=len(mine) + 1)[1:].tolist() == LENGTHS[mine].tolist()
            starts = np.flatnonzero(np.diff(segments, prepend=0) > 0)
            assert not arrays["mask"][line, starts].any()
            assert arrays["mask"][line].sum() == (LENGTHS[mine] - 1).sum()


def test_a_batch_does_not_depend_on_how_it_is_divided():
    """Catches a packing that each rank does for itself: other documents, other step counts."""
    for batch in plan():
        whole = collate(Numbered(), batch, slice(0, 4), pad_id=0)
        parts = [collate(Numbered(), batch, slice(start, start + 2), pad_id=0) for start in (0, 2)]
        for name, array in whole.items():
            assert np.array_equal(array, np.concatenate([part[name] for part in parts]))


def test_lines_are_filled_exactly():
    """Catches greedy filling: 6 + 2 + 2 fills a line of 10, the longest row that fits would leave 6 + 3."""
    (batch,) = plan([6, 3, 2, 2], max_seq_len=10, global_batch_size=8, shuffle=False)
    lines = [batch.rows[batch.positions == line].tolist() for line in range(batch.num_positions)]
    assert lines == [[0, 2, 3], [1]]


@pytest.mark.parametrize("seed", range(8))
def test_best_fill_is_the_best(seed):
    """Catches a wrong walk back through the sums: compared with every subset, counts of equal lengths included."""
    chooser = np.random.RandomState(seed)
    lengths, room = chooser.randint(2, 12, 9), int(chooser.randint(5, 40))
    waiting = {}
    for row, length in enumerate(lengths.tolist()):
        waiting.setdefault(length, []).append(row)
    filled = _best_fill(sorted(waiting, reverse=True), waiting, room)
    sums = [sum(subset) for size in range(10) for subset in combinations(lengths.tolist(), size)]
    assert sum(filled) == max(total for total in sums if total <= room)
    assert all(filled.count(length) <= len(rows) for length, rows in waiting.items())


def test_epochs_mix_other_documents():
    """Catches a packing that always puts the same rows side by side."""
    lengths = np.full(40, 50)
    meetings = [{tuple(sorted(batch.rows[batch.positions == line])) for batch in plan(lengths, epoch=epoch)
                 for line in range(batch.num_positions)} for epoch in (0, 1, 0)]
    assert meetings[0] == meetings[2] != meetings[1]


def test_epochs_have_equally_many_steps():
    """Catches a step count that depends on the order of the rows: schedules and resuming count on one number."""
    assert len({len(plan(epoch=epoch)) for epoch in range(6)}) == 1
    assert len(plan(shuffle=False)) == len(plan())


def test_refusals():
    """Catches a row that is longer than a line, which would be cut without a word."""
    with pytest.raises(ValueError, match="A row has 300 tokens"):
        plan([300])
    with pytest.raises(ValueError, match="no rows"):
        plan([])


@pytest.mark.skipif(not WIKISQL.is_dir(), reason="the WikiSQL sample is not beside the checkout")
@pytest.mark.parametrize("max_seq_len", [512, 1024])
def test_padding_on_real_rows(max_seq_len):
    """Catches waste on real lengths: packed lines are under 1 % padding, length groups under 12 %."""
    data = config(train=str(WIKISQL), max_seq_len=max_seq_len)
    rows = load_splits(data, build_tokenizer(corpus(data, 0), 2000), 0).train

    def padding(batches):
        return 1 - rows.lengths.sum() / sum(batch.num_positions * batch.length for batch in batches)

    options = {"seed": 0, "epoch": 0, "global_batch_size": 8, "max_seq_len": max_seq_len}
    assert padding(plan_packed(rows.lengths, **options)) < 0.01
    assert padding(plan_epoch(rows.lengths, **options)) < 0.12
