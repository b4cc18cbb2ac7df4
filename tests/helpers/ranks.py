"""Starts real processes that talk to each other, for tests.

`run_ranks(script, num_ranks)` runs one Python script on every rank and returns what each printed.
A worker reports with one line `RESULT {...}`. A rank that fails ends the others at once. No rank outlives the call;
on Linux none outlives this process either, however that ends. Limits are longer on a machine that is busy.
"""

import functools
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OPENBLAS = Path("/usr/lib/x86_64-linux-gnu/openblas-pthread/libblas.so.3")  # see conftest.py
MORTAL = (sys.executable, "-S", str(ROOT / "tests" / "helpers" / "mortal.py"))
GRACE_SECONDS = 3.0  # for the other ranks to report, once one has failed
QUIET_START_SECONDS = 0.5  # what `slowness` measures on two cores without other work: 0.3 to 0.4


@dataclass(frozen=True)
class RankResult:
    """What one rank left behind. Under MPI all ranks share mpirun's exit code."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def result(self) -> Any:
        """The object of the last `RESULT` line."""
        lines = [line for line in self.stdout.splitlines() if line.startswith("RESULT ")]
        assert lines, f"no RESULT line\n{self.stdout}\n{self.stderr}"
        return json.loads(lines[-1].removeprefix("RESULT "))


def run_ranks(
    script: str | Path,
    num_ranks: int,
    *,
    backend: str = "ring",
    args: Sequence[str] = (),
    timeout: float = 60,
    env: dict[str, str] | None = None,
    check: bool = True,
    left_behind: Sequence[int] = (),
) -> list[RankResult]:
    """Runs `script` on `num_ranks` processes.

    Args:
        script: A Python file, or Python source (recognised by its line breaks).
        num_ranks: How many processes.
        backend: "ring" or "mpi".
        args: Arguments of the script.
        timeout: Seconds after which all are killed and the test fails, on a quiet machine.
        env: Further environment variables.
        check: Fail the test, with every rank's output, if a rank fails. False: only return.
        left_behind: Ranks that are killed once all others have ended.
    """
    assert backend in ("ring", "mpi"), f"no way to start {backend!r} ranks"
    with tempfile.TemporaryDirectory() as folder, ExitStack() as held:
        if "\n" in str(script):
            source = Path(folder, "worker.py")
            source.write_text(str(script))
            script = source
        command = [sys.executable, str(script), *map(str, args)]
        start = _start_ring if backend == "ring" else _start_mpi
        limit = timeout * slowness()
        processes: list[subprocess.Popen] = []
        try:
            for process in start(command, num_ranks, folder, {**_environment(), **(env or {})}, held):
                processes.append(process)
            awaited = [p for rank, p in enumerate(processes) if rank not in left_behind]
            timed_out = _wait(awaited, limit, stop_early=check)
        finally:
            _kill(processes)
        codes = [process.returncode for process in processes]
        codes = codes if backend == "ring" else codes * num_ranks
        results = [
            RankResult(codes[rank], _read(folder, rank, "out"), _read(folder, rank, "err"))
            for rank in range(num_ranks)
        ]
    report = "".join(
        f"\n--- rank {rank}: exit {r.returncode}\n{r.stdout[-4000:]}{r.stderr[-4000:]}"
        for rank, r in enumerate(results)
    )
    assert not timed_out, f"not finished after {limit:.0f} s{report}"
    assert not check or not any(codes), f"a rank failed{report}"
    return results


@functools.cache
def slowness() -> float:
    """How many times longer than on a quiet machine two ranks take to start, at least 1: the factor for time limits.

    Measured once, at the first call.
    """
    began = time.monotonic()
    command = [sys.executable, "-c", "import mlx.core, mlx.nn, comm; comm.init()"]
    started = [subprocess.Popen(command, env=_environment()) for _ in range(2)]
    try:
        codes = [process.wait() for process in started]
    finally:
        _kill(started)
    assert not any(codes), f"ranks do not start: exit codes {codes}"
    return max(1.0, (time.monotonic() - began) / QUIET_START_SECONDS)


def reserve_ports(num_ports: int) -> list[socket.socket]:
    """Sockets bound to free ports of 127.0.0.1; ranks may bind the same ports while these live."""
    sockets = [socket.socket() for _ in range(num_ports)]
    for one in sockets:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind(("127.0.0.1", 0))
    return sockets


def _environment() -> dict[str, str]:
    launched = ("MLX_", "OMPI_", "PMIX_", "PRTE_", "COMM_", "JACCL_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(launched)}
    if OPENBLAS.exists():
        kept["LD_PRELOAD"] = str(OPENBLAS)
    return {
        **kept,
        "OPENBLAS_NUM_THREADS": "1",
        "MLX_DISABLE_COMPILE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")]),
        "PYTHONUNBUFFERED": "1",
    }


def _start_ring(
    command: list[str], num_ranks: int, folder: str, env: dict[str, str], held: ExitStack
) -> Iterator[subprocess.Popen]:
    # Until the ranks have ended, as nobody else may have a port before MLX has it.
    reserved = [held.enter_context(one) for one in reserve_ports(num_ranks)]
    hosts = [[f"127.0.0.1:{one.getsockname()[1]}"] for one in reserved]
    hostfile = Path(folder, "hosts.json")
    hostfile.write_text(json.dumps(hosts))
    for rank in range(num_ranks):
        out = held.enter_context(open(Path(folder, f"{rank}.out"), "wb"))
        err = held.enter_context(open(Path(folder, f"{rank}.err"), "wb"))
        rank_env = {**env, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hostfile)}
        full = [*MORTAL, str(os.getpid()), *command]
        yield subprocess.Popen(full, env=rank_env, stdout=out, stderr=err)


def _start_mpi(
    command: list[str], num_ranks: int, folder: str, env: dict[str, str], held: ExitStack
) -> Iterator[subprocess.Popen]:
    mpirun = Path(sys.executable).parent / "mpirun"
    mpirun = str(mpirun) if mpirun.exists() else shutil.which("mpirun")
    assert mpirun, "mpirun is missing: pip install -e '.[test]'"
    redirect = f'exec {shlex.join(MORTAL)} $PPID "$@" >"$0/$OMPI_COMM_WORLD_RANK.out" 2>"$0/$OMPI_COMM_WORLD_RANK.err"'
    options = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", str(num_ranks)]
    full = [*MORTAL, str(os.getpid()), mpirun, *options, "/bin/sh", "-c", redirect, folder, *command]
    quiet = {"OMPI_MCA_mpi_yield_when_idle": "1", "OMPI_MCA_btl": "self,sm"}
    yield subprocess.Popen(full, env={**env, **quiet}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _wait(processes: list[subprocess.Popen], timeout: float, stop_early: bool) -> bool:
    deadline = time.monotonic() + timeout
    failed_at = None
    while any(process.poll() is None for process in processes):
        now = time.monotonic()
        if failed_at is None and any(process.poll() for process in processes):
            failed_at = now
        gave_up = stop_early and failed_at is not None and now > failed_at + GRACE_SECONDS * slowness()
        if gave_up or now > deadline:
            _kill(processes)
            return failed_at is None
        time.sleep(0.02)
    return False


def _kill(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()


def _read(folder: str, rank: int, name: str) -> str:
    path = Path(folder, f"{rank}.{name}")
    return path.read_text(errors="replace") if path.exists() else ""
