"""What the watchdog concludes from the table of all ranks, without processes or waiting."""

from collections.abc import Sequence

import pytest

from comm.judging import Judge, RankStatus


def seconds_to_end(
    table: Sequence[RankStatus], timeout: float = 300, phase_timeout: float = 600
) -> tuple[int, str]:
    """After how many seconds, in which no rank moves, the job ends, and why; at most 1000."""
    judge = Judge(timeout, phase_timeout, 1.0)
    for seconds in range(1, 1000):
        for status in table:
            status.idle_seconds += 1.0
        if reason := judge.reason_to_end(table, range(len(table)), 1.0):
            return seconds, reason
    return 1000, ""


def waiting(number: int, **fields: object) -> RankStatus:
    return RankStatus("host", number, "all_sum", needs_others=True, **fields)


@pytest.mark.parametrize("timeout", [300, 5])
def test_a_rank_that_left_is_not_waited_for_until_the_timeout(timeout: float) -> None:
    """Catches a backend without errors of its own costing the whole time-out."""
    table = [waiting(8), waiting(7, left=True)]
    seconds, reason = seconds_to_end(table, timeout)
    assert seconds <= min(28, timeout + 1)
    assert reason.startswith("rank 1 (host) ended early")


def test_a_rank_may_be_busy_after_the_others_have_left() -> None:
    """Catches a rank that needs nobody being ended soon, because the others are done."""
    busy = RankStatus("host", 8, "end of saving")
    for table in ([busy, waiting(7, left=True)], [waiting(7), waiting(7, left=True)]):
        assert seconds_to_end(table)[0] > 300


def test_a_phase_that_moves_nowhere_is_a_hang() -> None:
    """Catches a hang in evaluation or saving that lasts for ever, or blames the rank that waits."""
    table = [waiting(8, phase="evaluation"), waiting(7, phase="evaluation")]
    seconds, reason = seconds_to_end(table)
    assert 600 <= seconds <= 602
    assert reason == f"the phase 'evaluation' has not moved for {seconds} s on rank 1 (host)"
    table = [waiting(8), waiting(7, phase="saving")]
    assert 0 < seconds_to_end(table, phase_timeout=20)[0] <= 22


def test_a_phase_that_waits_for_a_rank_that_left_names_it() -> None:
    """Catches blame for the rank that waits alone, where the backend says nothing of the one that is gone."""
    table = [waiting(14, phase="evaluation"), RankStatus("host", 14, "end of evaluation", left=True)]
    seconds, reason = seconds_to_end(table)
    assert reason == f"the phase 'evaluation' has not moved for {seconds} s on rank 0 (host), and rank 1 (host) has left"


def test_a_phase_lasts_while_one_rank_moves_or_a_person_types() -> None:
    """Catches a job ended while rank 0 alone writes for long, or nobody has typed a question yet."""
    judge = Judge(300, 600, 1.0)
    table = [waiting(7, phase="saving"), waiting(8, phase="saving", idle_seconds=9999.0)]
    assert judge.reason_to_end(table, [0, 1], 1.0) is None
    assert seconds_to_end([waiting(7, phase="reading"), waiting(8)]) == (1000, "")


def test_a_silent_cable_is_named_where_all_wait() -> None:
    """Catches all ranks being blamed for a cut cable, and a slow rank not being blamed."""
    table = [waiting(7), waiting(7, silent_addresses=["10.0.0.2"]), waiting(7)]
    seconds, reason = seconds_to_end(table)
    assert seconds <= 302
    words = "rank 1 (host) gets no answer from rank 2 (host) at 10.0.0.2"
    assert reason == f"a collective has waited {seconds} s: {words}"
    judge = Judge(300, 600, 1.0)
    assert not judge.must_probe(table)
    judge.reason_to_end(table, range(3), 298.0)
    assert judge.must_probe(table)
