"""One job and one fault: starts `python -m comm launch`, lets one rank meet its fault, and sees how the job ends.

The places are two ranks here, on ring and on MPI, and three and four machines of `tests/desk`, on a ring of cables.
What ends a job must take at most its time-out (in a long phase that only hangs, the phase's) and ten seconds.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers"), str(ROOT / "tests" / "desk")]

from machines import Desk, why_not

from ranks import MORTAL

WORKER = Path(__file__).parent / "workers" / "life.py"
TIMEOUT_SECONDS = 6.0
PHASE_TIMEOUT_SECONDS = 12.0
SLACK_SECONDS = 10.0
LIMIT_SECONDS = 120.0  # after which a job that does not end is given up
NUM_STARTS = 3  # on a busy machine a rank may start too late for a time-out that short

PHASES = ("before init", "after init", "collective", "compute", "evaluation", "saving", "final write", "after result")
LONG_PHASES = ("evaluation", "saving", "final write")
FAULTS = ("kill", "stop", "terminate", "exit 0", "exit 3", "raise", "sleep", "block", "sockets")
OUTSIDE_FAULTS = ("cut", "unplug")
# Where there is nothing to do it to: no connection yet, or a main thread that is in MLX.
IMPOSSIBLE = {("sockets", "before init"), ("raise", "collective"), ("sleep", "collective"), ("block", "collective")}
PLACES = {"ring": 2, "mpi": 2, "desk of 3": 3, "desk of 4": 4}


@dataclass(frozen=True)
class Case:
    """Which fault meets which rank, in which phase, and where."""

    place: str
    fault: str
    phase: str
    rank: int

    @property
    def bound_seconds(self) -> float:
        """How long after the fault the job may end at the latest, on a quiet machine."""
        hangs = self.fault in ("sleep", "cut") and self.phase in LONG_PHASES
        return (PHASE_TIMEOUT_SECONDS if hangs else TIMEOUT_SECONDS) + SLACK_SECONDS

    @property
    def may_succeed(self) -> bool:
        """Whether nobody needs the rank any more, or what is broken."""
        return self.phase == "after result" and self.fault in ("exit 0", "sockets", *OUTSIDE_FAULTS)


@dataclass(frozen=True)
class Outcome:
    """How the job of a case ended.

    Attributes:
        case: The case.
        seconds: From the fault to the launcher's end.
        code: The launcher's exit code.
        names_rank: Whether what is shown names the rank.
        num_left: Processes of the job that were still there at the end of the bound.
        has_come: Whether the fault came; the job may have ended before.
        output: What the job showed.
    """

    case: Case
    seconds: float
    code: int
    names_rank: bool
    num_left: int
    has_come: bool
    output: str

    def complaints(self, slowness: float = 1.0) -> list[str]:
        """What is not as it should be, on a machine that takes so many times longer to start and end processes."""
        case, found = self.case, [] if self.has_come else ["the fault never came"]
        if self.seconds > case.bound_seconds + SLACK_SECONDS * (slowness - 1):
            found.append(f"took {self.seconds:.1f} s of {case.bound_seconds:.0f}")
        if self.code == 0 and not case.may_succeed:
            found.append("exit code 0")
        if self.code and not self.names_rank and not case.may_succeed:
            found.append("does not name the rank")
        if self.num_left:
            found.append(f"{self.num_left} processes left")
        return found


def cases_of(place: str, fault: str) -> list[Case]:
    """Every phase with every rank."""
    pairs = [(phase, rank) for phase in PHASES for rank in range(PLACES[place]) if (fault, phase) not in IMPOSSIBLE]
    return [Case(place, fault, phase, rank) for phase, rank in pairs]


def faults_of(place: str) -> tuple[str, ...]:
    """On the desk what one host cannot show, and two of the others to compare."""
    return (*OUTSIDE_FAULTS, "kill", "stop") if place.startswith("desk") else FAULTS


def why_not_at(place: str) -> str:
    """Why nothing can run at `place` here, "" where it can."""
    return why_not() if place.startswith("desk") else ""


def run_case(case: Case, number: int) -> Outcome:
    """Runs a case, again where the job ended before its fault.

    Args:
        case: The case.
        number: Differs between cases that run at the same time.
    """
    for _ in range(NUM_STARTS):
        outcome = _run_once(case, number)
        if outcome.has_come:
            break
    return outcome


def _run_once(case: Case, number: int) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="fault-") as folder:
        fault = "outside" if case.fault in OUTSIDE_FAULTS else case.fault
        worker = [sys.executable, str(WORKER), case.phase, fault, str(case.rank), folder]
        if not case.place.startswith("desk"):
            options = ["-n", str(PLACES[case.place]), "--backend", case.place]
            command = [*MORTAL, str(os.getpid()), *_launch(options), *worker]
            job = subprocess.Popen(
                command, cwd=ROOT, env=_environment(), text=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            return _watch(case, job, folder, lambda: None)
        desk = Desk(PLACES[case.place], cables=1, name=f"-{number}")
        try:
            hostfile = Path(folder, "hosts.json")
            hostfile.write_text(json.dumps(desk.hosts()))
            options = ["--hostfile", str(hostfile), "--ssh", desk.ssh, "--python", sys.executable, "--cwd", str(ROOT)]
            job = desk.start(*_launch(options), "env", f"PYTHONPATH={ROOT}", *worker, cwd=ROOT, env=_environment())
            harm = {"cut": desk.cut, "unplug": desk.unplug}.get(case.fault, lambda index: None)
            return _watch(case, job, folder, lambda: harm(case.rank))
        finally:
            desk.close()


def _launch(options: list[str]) -> list[str]:
    return [sys.executable, "-m", "comm", "launch", *options, "--timeout", f"{TIMEOUT_SECONDS:g}", "--"]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "COMM_PHASE_TIMEOUT": f"{PHASE_TIMEOUT_SECONDS:g}"}


def _watch(case: Case, job: "subprocess.Popen[str]", folder: str, harm: Callable[[], None]) -> Outcome:
    """Reads what the job shows until its end. At the words of the rank that waits for it, does `harm`."""
    output, struck = [], time.monotonic()
    patience = threading.Timer(LIMIT_SECONDS, job.kill)
    patience.start()
    for line in job.stdout:
        output.append(line)
        if "FAULT " in line:
            harm()
            # The victim's own clock, which is this one's, except where the fault comes from here.
            struck = time.monotonic() if case.fault in OUTSIDE_FAULTS else float(line.rsplit(" ", 1)[1])
    code = job.wait()
    seconds = time.monotonic() - struck
    patience.cancel()
    job.stdout.close()
    text = "".join(output)
    left = _left_behind(folder, max(case.bound_seconds - seconds, 2.0))
    return Outcome(case, seconds, code, _names(text, case), len(left), "FAULT " in text, text)


def _names(text: str, case: Case) -> bool:
    """Whether a line that says why the job ended names the rank: ours, or mpirun's, which our launcher takes for rank 0."""
    launcher = r"prterun .*|.*Process name: .*" if case.place == "mpi" else r"comm launch: rank .*"
    reasons = re.findall(rf"comm: the job ends: .*?\. The|.*did not start within.*|{launcher}", text)
    return any(re.search(rf"\brank {case.rank}\b|@1,{case.rank}\]", reason) for reason in reasons)


def _left_behind(token: str, patience_seconds: float) -> list[int]:
    """Processes with `token` on their command line that do not end in time; they are killed."""
    deadline = time.monotonic() + patience_seconds
    while (left := _processes(token)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    return left


def _processes(token: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue  # has ended since
        if token.encode() in words and int(path.parent.name) != os.getpid():
            found.append(int(path.parent.name))
    return found
