"""The table of faults: what happens to a job when one of its ranks meets one, in every phase of its life.

`python tests/faults/table.py` runs two ranks here, on ring and on MPI (20 minutes on two cores), and
`python tests/faults/table.py --place "desk of 3" --fault cut --phase collective --rank 1` a single case.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from fault_runs import FAULTS, OUTSIDE_FAULTS, PHASES, PLACES, Case, Outcome, cases_of, faults_of, run_case


def main() -> int:
    """Runs what is asked for; returns 1 where something is not as it should be."""
    arguments = _arguments()
    cases = [
        case
        for place in arguments.place
        for fault in faults_of(place)
        for case in cases_of(place, fault)
        if fault in arguments.fault and case.phase in arguments.phase and case.rank in arguments.rank
    ]
    outcomes = []
    for outcome in run_cases(cases, arguments.jobs):
        print(line_of(outcome), flush=True)
        if arguments.verbose and outcome.complaints():
            print(outcome.output, flush=True)
        outcomes.append(outcome)
    print(table_of(outcomes))
    if arguments.json:
        rows = [asdict(outcome) | {"complaints": outcome.complaints()} for outcome in outcomes]
        arguments.json.write_text(json.dumps(rows, indent=1))
    return int(any(outcome.complaints() for outcome in outcomes))


def run_cases(cases: Sequence[Case], jobs: int = 3) -> Iterator[Outcome]:
    """The outcomes in order; `jobs` cases run at a time, as most of the time is spent waiting."""
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(run_case, cases, itertools.count())


def line_of(outcome: Outcome) -> str:
    """One case in one line."""
    case = outcome.case
    what = f"{case.place}: {case.fault}, {case.phase}, rank {case.rank}"
    named = "names it" if outcome.names_rank else "-"
    return f"{what:45} {outcome.seconds:5.1f} s  exit {outcome.code:3}  {named:8}  {'; '.join(outcome.complaints())}".rstrip()


def table_of(outcomes: Sequence[Outcome]) -> str:
    """Seconds and exit code by phase, a row for each place, fault and rank; `!` where something is not as it should be."""
    phases = [phase for phase in PHASES if any(outcome.case.phase == phase for outcome in outcomes)]
    rows: dict[str, dict[str, str]] = {}
    for one in outcomes:
        mark = "!" if one.complaints() else " "
        row = rows.setdefault(f"{one.case.place}: {one.case.fault}, rank {one.case.rank}", {})
        row[one.case.phase] = f"{one.seconds:.1f}/{one.code}{mark}"
    lines = [" " * 30 + "".join(f"{phase:>13}" for phase in phases)]
    lines += [f"{name:30}" + "".join(f"{row.get(phase, ''):>13}" for phase in phases) for name, row in rows.items()]
    good = sum(not outcome.complaints() for outcome in outcomes)
    return "\n".join([*lines, f"{good} of {len(outcomes)} as they should be (seconds/exit code)"])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--place", nargs="+", choices=PLACES, default=["ring", "mpi"])
    add("--fault", nargs="+", choices=(*FAULTS, *OUTSIDE_FAULTS), default=(*FAULTS, *OUTSIDE_FAULTS))
    add("--phase", nargs="+", choices=PHASES, default=PHASES)
    add("--rank", nargs="+", type=int, default=range(max(PLACES.values())))
    add("--jobs", type=int, default=3, help="cases at a time")
    add("--json", type=Path, help="write everything there, outputs too")
    add("--verbose", action="store_true", help="show the output of cases that are not as they should be")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
