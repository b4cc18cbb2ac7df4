"""Meeting before MLX connects: all ranks, a missing one, a missing rank 0, strangers."""

import json
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from comm.launcher.hostfile import Host, HostList
from comm.launcher.job import Job, mpi_job
from comm.rendezvous import Rendezvous, rendezvous_of
from ranks import _environment, slowness

ADDRESSES = ("127.0.0.1",) * 3


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def meet(ranks: list[int], timeout: float, **changed: str) -> list[str]:
    """What each rank is told; "" where all are there. `changed` goes for the last rank."""
    where = [Rendezvous(rank, ADDRESSES, 0, "secret") for rank in ranks]
    where[-1] = replace(where[-1], **changed)
    port = free_port()

    def told(one: Rendezvous) -> str:
        try:
            replace(one, port=port).meet(timeout)
        except TimeoutError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(told, where))


def test_all_ranks_meet() -> None:
    """Catches ranks that wait although all are there."""
    start = time.monotonic()
    assert meet([2, 1, 0], timeout=20) == [""] * 3
    assert time.monotonic() - start < 5 * slowness()


def test_a_missing_rank_is_named_on_every_rank_in_time() -> None:
    """Catches a job that waits for a rank which never starts, without saying for which."""
    start = time.monotonic()
    assert meet([0, 1], timeout=1) == ["rank 2 (127.0.0.1) did not start within 1 s"] * 2
    assert time.monotonic() - start < 3 * slowness()
    assert meet([1, 2], timeout=1) == ["rank 0 (127.0.0.1) did not start within 1 s"] * 2


def test_another_jobs_rank_does_not_count() -> None:
    """Catches a rank of another job taking the place of a missing one."""
    told = meet([0, 1, 2], timeout=1, secret="other")
    assert told[:2] == ["rank 2 (127.0.0.1) did not start within 1 s"] * 2 and told[2]


def test_init_names_the_missing_rank(tmp_path: Path) -> None:
    """Catches `comm.init` not meeting first; without the launcher's variables nothing is met."""
    hostfile = tmp_path / "hosts.json"
    hostfile.write_text(json.dumps([[f"127.0.0.1:{free_port()}"] for _ in range(2)]))
    variables = {
        "MLX_RANK": "0", "MLX_HOSTFILE": str(hostfile), "COMM_TIMEOUT": "1",
        "COMM_SECRET": "secret", "COMM_ADDRESSES": json.dumps(ADDRESSES[:2]),
    }  # fmt: skip
    assert rendezvous_of(variables) is not None
    assert rendezvous_of({**variables, "COMM_SECRET": ""}) is None
    done = subprocess.run(
        [sys.executable, "-c", "import comm; comm.init()"],
        env={**_environment(), **variables}, capture_output=True, text=True, timeout=40 * slowness(),
    )  # fmt: skip
    assert done.returncode == 1
    assert "rank 1 (127.0.0.1) did not start within 1 s" in done.stderr, done.stderr


def test_ranks_of_mpi_meet_where_all_are_on_this_host() -> None:
    """Catches ranks of mpirun that wait for one that never starts, or for those of another host, which are not told."""
    ours = {"COMM_ADDRESSES": json.dumps(["127.0.0.1"] * 3), "COMM_SECRET": "s", "COMM_MEETING_PORT": "7"}
    mpi = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3"}
    assert rendezvous_of(ours | mpi) == Rendezvous(2, ADDRESSES, 7, "s")
    assert rendezvous_of(ours | mpi | {"OMPI_COMM_WORLD_SIZE": "2"}) is None
    assert rendezvous_of(ours) is None and rendezvous_of(mpi) is None
    here = mpi_job(Job(("true",), HostList((Host("127.0.0.1"),) * 3), "mpi"))
    elsewhere = mpi_job(Job(("true",), HostList((Host("127.0.0.1"), Host("there"))), "mpi"))
    assert (here.num_meeting, elsewhere.num_meeting) == (3, 0)
    assert "COMM_SECRET" in here.command and "COMM_SECRET" not in elsewhere.command
