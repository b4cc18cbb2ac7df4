"""What `python -m comm launch` is to start, and what each rank needs for it: no process is started here."""

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from comm.hostfile import LOCAL, Host, HostList, check_hosts, read_hostfile

# The last rank of a ring is the first to call another one, and waits a whole second where rank 0 is not there yet.
HEAD_START_SECONDS = 0.1
# After this the connection to a host that vanished ends, also where no rank is left to say so.
SSH = "ssh -o BatchMode=yes -o ServerAliveInterval=30 -o ServerAliveCountMax=10"


@dataclass(frozen=True)
class Job:
    """What to start, and where.

    Attributes:
        command: The program and its arguments.
        hosts: One host per rank.
        backend: Backend of the world.
        timeout_seconds: The watchdog's time-out.
        max_restarts: How often the whole job is started again after a failure.
        python: The interpreter for agents on other hosts.
        ssh: The command that reaches them.
        cwd: Folder to start in, where it exists.
        prefix: Put the rank before each line.
    """

    command: tuple[str, ...]
    hosts: HostList
    backend: str
    timeout_seconds: float = 300.0
    max_restarts: int = 0
    python: str = "python3"
    ssh: str = SSH
    cwd: str = ""
    prefix: bool = True


def make_hosts(num_ranks: int | None, hosts: str | None, hostfile: str | None) -> HostList:
    """The hosts from the command line: N local ranks, names, or a hostfile.

    Raises:
        ValueError: Everything that is wrong with them.
    """
    if hostfile:
        if num_ranks or hosts:
            raise ValueError("--hostfile names the ranks; -n and --hosts do not go with it.")
        return read_hostfile(hostfile)
    names = hosts.split(",") if hosts else ["127.0.0.1"]
    single = HostList(tuple(Host(name) for name in names))
    problems = check_hosts(single)
    if problems:
        raise ValueError("\n".join(f"--hosts: {problem}" for problem in problems))
    return HostList(tuple(Host(name) for name in names for _ in range(num_ranks or 1)))


def mpi_job(job: Job) -> Job:
    """The same job in the hands of `mpirun`, which the launcher then starts as its only rank.

    Raises:
        ValueError: There is no mpirun.
    """
    beside = Path(sys.executable).parent / "mpirun"
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
    if not mpirun:
        raise ValueError("There is no mpirun: pip install -e '.[mpi]', or install Open MPI.")
    slots = Counter(host.ssh for host in job.hosts.hosts)
    options = ["--host", ",".join(f"{name}:{count}" for name, count in slots.items())]
    options += ["-n", str(len(job.hosts.hosts)), "--bind-to", "none", "--output", "rank"]
    if max(slots.values()) > (os.cpu_count() or 1):
        options += ["--map-by", ":OVERSUBSCRIBE", "--mca", "mpi_yield_when_idle", "1"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.append("--allow-run-as-root")
    variables = [*dict(job.hosts.variables), "COMM_TIMEOUT", "COMM_RESTARTS", "COMM_BACKEND", "PYTHONUNBUFFERED"]
    for name in variables:
        options += ["-x", name]
    hosts = replace(job.hosts, hosts=(Host(LOCAL[0]),))
    return replace(job, command=(mpirun, *options, *job.command), hosts=hosts)


def make_orders(
    job: Job, greetings: Sequence[dict[str, Any]], secret: str, attempt: int = 0
) -> list[dict[str, Any]]:
    """What each agent is to start: the command and the environment that its backend needs."""
    num_ranks = len(greetings)
    shared = {
        **dict(job.hosts.variables),
        "COMM_TIMEOUT": f"{job.timeout_seconds:g}",
        "COMM_RESTARTS": str(attempt),
        "PYTHONUNBUFFERED": "1",
    }
    if "COMM_PHASE_TIMEOUT" in os.environ:
        shared["COMM_PHASE_TIMEOUT"] = os.environ["COMM_PHASE_TIMEOUT"]
    files: dict[str, Any] = {}
    extra = [greeting["extra"][0] for greeting in greetings]
    if num_ranks > 1 or job.backend == "mpi":
        shared["COMM_BACKEND"] = job.backend
    if num_ranks > 1:
        shared["COMM_ADDRESSES"] = json.dumps([greeting["control"] for greeting in greetings])
        shared["COMM_SECRET"] = secret
        files["MLX_HOSTFILE"] = [greeting["ring"] for greeting in greetings]
        if job.backend.startswith("jaccl"):
            files["MLX_IBV_DEVICES"] = [host.rdma for host in job.hosts.hosts]
            shared["MLX_JACCL_COORDINATOR"] = extra[0]
        if job.backend == "jaccl-ring":
            shared["MLX_JACCL_RING"] = "1"
        if job.backend == "nccl":
            shared["MLX_WORLD_SIZE"] = str(num_ranks)
            shared["NCCL_HOST_IP"], shared["NCCL_PORT"] = extra[0].split(":")
    orders = []
    for rank, host in enumerate(job.hosts.hosts):
        variables = dict(shared)
        if num_ranks > 1:
            variables["MLX_RANK"] = str(rank)
        if job.backend == "nccl":
            before = [other.ssh for other in job.hosts.hosts[:rank]]
            variables["CUDA_VISIBLE_DEVICES"] = str(before.count(host.ssh))
        orders.append({
            "command": job.command, "cwd": job.cwd, "variables": variables, "files": files,
            "delay_seconds": HEAD_START_SECONDS if 0 < rank == num_ranks - 1 else 0.0,
        })  # fmt: skip
    return orders
