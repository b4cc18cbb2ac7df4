"""Every fault in every phase of a job's life, with every rank: the job ends in time, with an error, and says why.

About an hour on two cores, a part of it with `--exhaustive=PART/PARTS`; `table.py` shows single cases.
"""

import pytest
from fault_runs import PLACES, Case, cases_of, faults_of, why_not_at
from table import run_cases, table_of

from ranks import slowness

# What is known to be otherwise, by place, fault and phase.
RING_START = "MLX tries for 30 s to connect to the next rank"
HELD = "the others have ended well, and the rank's own watchdog cannot run: only the launcher could tell"
KNOWN = {
    **{(place, "cut", "before init"): RING_START for place in ("desk of 3", "desk of 4")},
    ("ring", "block", "after result"): HELD,
}


@pytest.mark.usefixtures("exhaustive")
@pytest.mark.parametrize(("place", "fault"), [(place, fault) for place in PLACES for fault in faults_of(place)])
def test_the_job_ends(place: str, fault: str) -> None:
    """Catches a job that hangs, calls itself successful, does not name the rank, or leaves processes behind."""
    if reason := why_not_at(place):
        pytest.skip(reason)
    outcomes = list(run_cases(cases_of(place, fault)))
    wrong = [outcome for outcome in outcomes if outcome.complaints(slowness()) and not is_known(outcome.case)]
    told = [f"{one.case}: {'; '.join(one.complaints())}\n{one.output}" for one in wrong]
    assert not wrong, "\n".join([table_of(outcomes), *told])


def is_known(case: Case) -> bool:
    """Whether the case is one of `KNOWN`."""
    return (case.place, case.fault, case.phase) in KNOWN
