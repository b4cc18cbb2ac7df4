"""Starts real processes that talk to each other, for tests.

`run_ranks(script, num_ranks)` runs one Python script on every rank and returns what each printed.
A worker reports with one line `RESULT {...}`. A rank that fails ends the others at once.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OPENBLAS = Path("/usr/lib/x86_64-linux-gnu/openblas-pthread/libblas.so.3")  # see conftest.py
GRACE_SECONDS = 3.0  # for the other ranks to report, once one has failed


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
        timeout: Seconds after which all are killed and the test fails.
        env: Further environment variables.
        check: Fail the test, with every rank's output, if a rank fails. False: only return.
        left_behind: Ranks that are killed once all others have ended.
    """
    assert backend in ("ring", "mpi"), f"no way to start {backend!r} ranks"
    with tempfile.TemporaryDirectory() as folder:
        if "\n" in str(script):
            source = Path(folder, "worker.py")
            source.write_text(str(script))
            script = source
        command = [sys.executable, str(script), *map(str, args)]
        start = _start_ring if backend == "ring" else _start_mpi
        processes = start(command, num_ranks, folder, {**_environment(), **(env or {})})
        awaited = [p for rank, p in enumerate(processes) if rank not in left_behind]
        timed_out = _wait(awaited, timeout, stop_early=check)
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
    assert not timed_out, f"not finished after {timeout} s{report}"
    assert not check or not any(codes), f"a rank failed{report}"
    return results


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
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "PYTHONUNBUFFERED": "1",
    }


def _start_ring(
    command: list[str], num_ranks: int, folder: str, env: dict[str, str]
) -> list[subprocess.Popen]:
    reserved = reserve_ports(num_ranks)
    hosts = [[f"127.0.0.1:{one.getsockname()[1]}"] for one in reserved]
    hostfile = Path(folder, "hosts.json")
    hostfile.write_text(json.dumps(hosts))
    processes = []
    for rank in range(num_ranks):
        with (
            open(Path(folder, f"{rank}.out"), "wb") as out,
            open(Path(folder, f"{rank}.err"), "wb") as err,
        ):
            rank_env = {**env, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hostfile)}
            processes.append(subprocess.Popen(command, env=rank_env, stdout=out, stderr=err))
    for one in reserved:
        one.close()
    return processes


def _start_mpi(
    command: list[str], num_ranks: int, folder: str, env: dict[str, str]
) -> list[subprocess.Popen]:
    mpirun = Path(sys.executable).parent / "mpirun"
    mpirun = str(mpirun) if mpirun.exists() else shutil.which("mpirun")
    assert mpirun, "mpirun is missing: pip install -e '.[test]'"
    redirect = 'exec "$@" >"$0/$OMPI_COMM_WORLD_RANK.out" 2>"$0/$OMPI_COMM_WORLD_RANK.err"'
    options = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", str(num_ranks)]
    full = [mpirun, *options, "/bin/sh", "-c", redirect, folder, *command]
    quiet = {"OMPI_MCA_mpi_yield_when_idle": "1", "OMPI_MCA_btl": "self,sm"}
    return [
        subprocess.Popen(
            full, env={**env, **quiet}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    ]


def _wait(processes: list[subprocess.Popen], timeout: float, stop_early: bool) -> bool:
    deadline = time.monotonic() + timeout
    failed_at = None
    while any(process.poll() is None for process in processes):
        now = time.monotonic()
        if failed_at is None and any(process.poll() for process in processes):
            failed_at = now
        gave_up = stop_early and failed_at is not None and now > failed_at + GRACE_SECONDS
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
