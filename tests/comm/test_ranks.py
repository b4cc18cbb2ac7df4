"""The tests' own launcher: no rank outlives the call that started it, nor the process."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import ranks
from ranks import ROOT, run_ranks, slowness

SLEEPER = """
import os, sys, time
from pathlib import Path
Path(sys.argv[1], f"{os.getpid()}.pid").touch()
time.sleep(100)
"""
CALLER = f"""
import sys
from ranks import run_ranks
run_ranks({SLEEPER!r}, 2, backend=sys.argv[2], args=[sys.argv[1]], timeout=100)
"""
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")


def sleepers(folder: Path) -> list[int]:
    return [int(path.stem) for path in folder.glob("*.pid")]


def are_gone(pids: list[int]) -> bool:
    """Whether none of them runs; ended ones that nobody has waited for do not count."""
    states = subprocess.run(["ps", "-o", "state=", "-p", ",".join(map(str, pids))], capture_output=True, text=True)
    return all(state.startswith("Z") for state in states.stdout.split())


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20 * slowness()
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.05)


@linux_only
@pytest.mark.parametrize(
    ("number", "backend"), [(signal.SIGKILL, "ring"), (signal.SIGKILL, "mpi"), (signal.SIGINT, "ring")]
)
def test_ranks_end_with_the_process_that_started_them(tmp_path: Path, number: int, backend: str) -> None:
    """Catches workers that an interrupted test run leaves behind, on cores that the next one needs."""
    command = [sys.executable, "-c", CALLER, str(tmp_path), backend]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")])}
    with subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) as caller:
        try:
            wait_for(lambda: len(sleepers(tmp_path)) == 2, "the ranks to start")
        finally:
            caller.send_signal(number)
    wait_for(lambda: are_gone(sleepers(tmp_path)), "the ranks to end")


def test_a_start_that_fails_half_way_leaves_no_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a first rank that goes on alone where the second one cannot be started."""
    slowness()  # starts processes of its own
    started: list[subprocess.Popen] = []
    popen = subprocess.Popen

    def first_only(*arguments: object, **options: object) -> subprocess.Popen:
        if started:
            raise OSError("no more processes")
        started.append(popen(*arguments, **options))
        return started[0]

    monkeypatch.setattr(ranks.subprocess, "Popen", first_only)
    with pytest.raises(OSError, match="no more processes"):
        run_ranks(SLEEPER, 2, args=[str(tmp_path)])
    assert started[0].returncode == -signal.SIGKILL
