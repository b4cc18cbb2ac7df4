"""What `python -m comm launch` is to start, and what each rank needs for it: no process is started here."""

import json
import math
import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from comm.launcher.cuda import visible_gpus
from comm.launcher.hostfile import LOCAL, Host, HostList, check_hosts, check_rdma, names_every_device, read_hostfile
from comm.rendezvous import MEETING_PORT

# The last rank of a ring is the first to call another one, and waits a whole second where rank 0 is not there yet.
HEAD_START_SECONDS = 0.1
SSH = "ssh"
CONNECT_SECONDS = 60.0  # for ssh to reach a host, at most
KEEP_ALIVE_SECONDS = 15.0  # between the questions whether a host is still there


@dataclass(frozen=True)
class Job:
    """What to start, and where.

    Attributes:
        command: The program and its arguments.
        hosts: One host per rank.
        backend: Backend of the world.
        timeout_seconds: The watchdog's time-out.
        max_restarts: How often the whole job is started again after a failure.
        python: The interpreter for agents on other hosts, and for `python` in the command. Default: this one's path,
            as another host's `python3` may be its system's.
        ssh: The command that reaches them.
        cwd: Folder to start in, where it exists.
        prefix: Put the rank before each line.
        num_meeting: How many ranks mpirun starts on this host, which meet before MPI begins; 0 where some are elsewhere.
    """

    command: tuple[str, ...]
    hosts: HostList
    backend: str
    timeout_seconds: float = 300.0
    max_restarts: int = 0
    python: str = sys.executable
    ssh: str = SSH
    cwd: str = ""
    prefix: bool = True
    num_meeting: int = 0


def make_hosts(num_ranks: int | None, hosts: str | None, hostfile: str | None, backend: str | None) -> HostList:
    """The hosts from the command line: N local ranks, names, or a hostfile; and the backend, the hostfile's or ring.

    Raises:
        ValueError: Everything that is wrong with them.
    """
    if hostfile:
        if num_ranks or hosts:
            raise ValueError("--hostfile names the ranks; -n and --hosts do not go with it.")
        found = read_hostfile(hostfile, backend or "")
        return replace(found, backend=found.backend or "ring")
    names = hosts.split(",") if hosts else ["127.0.0.1"]
    if problems := check_hosts(HostList(tuple(Host(name) for name in names))):
        raise ValueError("\n".join(f"--hosts: {problem}" for problem in problems))
    everyone = HostList(tuple(Host(name) for name in names for _ in range(num_ranks or 1)))
    everyone = replace(everyone, backend=backend or default_backend(everyone))
    if problems := check_rdma(everyone):
        raise ValueError(f"--backend {backend} needs --hostfile with the rdma devices: {problems[0]}")
    return everyone


def default_backend(hosts: HostList) -> str:
    """NCCL where each rank on this host can have a GPU of its own and there are no others, else ring."""
    alone = all(host.is_local for host in hosts.hosts)
    return "nccl" if alone and 1 < len(hosts.hosts) <= len(visible_gpus(os.environ)) else "ring"


def ssh_words(command: str, timeout_seconds: float) -> list[str]:
    """The command that reaches hosts, by words.

    Where that is ssh it never asks for a password, takes IPv4 as MLX does, gives up a host that does not answer, and ends the connection to one
    that vanished. What the command says about that itself comes first, and ssh takes the first word.

    Args:
        command: Such as "ssh -p 2222".
        timeout_seconds: How long a rank may be missing; 0: as for 300.
    """
    words = shlex.split(command)
    if Path(words[0]).name != "ssh":
        return words
    timeout = timeout_seconds or 300.0
    connect, interval = (max(1, round(min(timeout, most))) for most in (CONNECT_SECONDS, KEEP_ALIVE_SECONDS))
    settings = {
        "BatchMode": "yes",
        "AddressFamily": "inet",
        "ConnectTimeout": connect,
        "ServerAliveInterval": interval,
        "ServerAliveCountMax": max(1, math.ceil(timeout / interval)),
    }
    return [*words, *(word for name, value in settings.items() for word in ("-o", f"{name}={value}"))]


def remote_line(cwd: str, words: Sequence[str]) -> str:
    """What a host's shell is to run: the words, in `cwd` where that exists there."""
    return f"cd {shlex.quote(cwd)} 2>/dev/null; exec {shlex.join(words)}"


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
    variables += ["COMM_PHASE_TIMEOUT"] if "COMM_PHASE_TIMEOUT" in os.environ else []
    num_here = len(job.hosts.hosts) if all(host.is_local for host in job.hosts.hosts) else 0
    variables += ["COMM_ADDRESSES", "COMM_SECRET", MEETING_PORT] if num_here else []
    for name in variables:
        options += ["-x", name]
    hosts = replace(job.hosts, hosts=(Host(LOCAL[0]),))
    return replace(job, command=(mpirun, *options, *job.command), hosts=hosts, num_meeting=num_here)


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
    if job.num_meeting:
        address, _, port = extra[0].partition(":")
        shared |= {"COMM_ADDRESSES": json.dumps([address] * job.num_meeting), "COMM_SECRET": secret, MEETING_PORT: port}
    if num_ranks > 1:
        shared["COMM_ADDRESSES"] = json.dumps([greeting["control"] for greeting in greetings])
        shared["COMM_SECRET"] = secret
        files["MLX_HOSTFILE"] = [greeting["ring"] for greeting in greetings]
        # A world on ring may have a tensor-parallel group on JACCL.
        if job.backend.startswith("jaccl") or (job.backend == "ring" and names_every_device(job.hosts)):
            files["MLX_IBV_DEVICES"] = [host.rdma for host in job.hosts.hosts]
            shared["MLX_JACCL_COORDINATOR"] = extra[0]
        if job.backend == "jaccl-ring":
            shared["MLX_JACCL_RING"] = "1"
        if job.backend == "nccl":
            shared["MLX_WORLD_SIZE"] = str(num_ranks)
            shared["NCCL_HOST_IP"], shared["NCCL_PORT"] = extra[0].split(":")
    orders = []
    gpus_here = visible_gpus(os.environ)
    for rank, host in enumerate(job.hosts.hosts):
        variables = dict(shared)
        if num_ranks > 1:
            variables["MLX_RANK"] = str(rank)
        number_here = [other.ssh for other in job.hosts.hosts[:rank]].count(host.ssh)
        if host.is_local and num_ranks > 1 and gpus_here:
            variables["CUDA_VISIBLE_DEVICES"] = gpus_here[number_here % len(gpus_here)]
        elif job.backend == "nccl":
            variables["CUDA_VISIBLE_DEVICES"] = str(number_here)
        orders.append({
            "command": job.command, "cwd": job.cwd, "variables": variables, "files": files,
            "delay_seconds": HEAD_START_SECONDS if 0 < rank == num_ranks - 1 else 0.0,
        })  # fmt: skip
    return orders
