"""`python -m comm launch`: starts one program on every rank and answers for all of them.

One agent per rank, as a child process or over ssh, starts the program and ends with the
launcher, however that ends. Threads block on the agents' output and exit codes; nothing polls.
What is typed at the launcher goes to rank 0, wherever that runs (as with mpirun); the other ranks,
and a job that was started again, read the end of the input.
The job's secret and every other setting travel over the agents' stdin, never on a command line.
"""

import json
import os
import queue
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from comm.agent import GREETING
from comm.hostfile import LOCAL, Host, HostList, check_hosts, read_hostfile

GRACE_SECONDS = 6.0  # for the watchdogs to name the missing rank, once one has failed
STOP_SECONDS = 5.0  # from SIGTERM to SIGKILL
# The last rank of a ring is the first to call another one, and waits a whole second where rank 0 is not there yet.
HEAD_START_SECONDS = 0.1
MPI_PREFIX = re.compile(rb"^(\[\d+\])<std(?:out|err)>: ?")
USER_ERROR = 2  # what the user wrote is wrong: starting again would not help


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
    ssh: str = "ssh -o BatchMode=yes"
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


def launch(job: Job) -> int:
    """Runs the job, restarting it as allowed; returns the first failing rank's exit code."""
    for attempt in range(job.max_restarts + 1):
        run = Run(job, attempt)
        code = run.finish()
        if code in (0, USER_ERROR) or run.told_to_stop or attempt == job.max_restarts:
            return code
        _say(f"the job failed with exit code {code}; restart {attempt + 1} of {job.max_restarts}")
    return code


class Run:
    """One attempt: starts every rank on construction.

    Args:
        job: What to start.
        attempt: Restarts before this one. In the first, 0, rank 0 reads what this process reads.
    """

    def __init__(self, job: Job, attempt: int):
        self.job = job
        takes_input = attempt == 0
        self.told_to_stop = False
        self._events: queue.Queue[tuple[str, int, int]] = queue.Queue()
        self._lock = threading.Lock()
        self._code = 0
        self._agents = [self._start_agent(host) for host in job.hosts.hosts]
        self._running = set(range(len(self._agents)))
        try:
            greetings = [self._greeting(rank) for rank in range(len(self._agents))]
        except ValueError as error:
            _say(str(error))
            for agent in self._agents:
                agent.kill()
            self._code, greetings = 1, []
        orders = make_orders(job, greetings, secrets.token_hex(32), attempt) if greetings else []
        for rank, order in enumerate(orders):
            self._tell(rank, order | {"takes_input": takes_input and rank == 0})
        if takes_input and orders:
            threading.Thread(target=self._forward_input, daemon=True).start()
        self._readers = [
            threading.Thread(target=self._copy, args=(rank, pipe, out), daemon=True)
            for rank, agent in enumerate(self._agents)
            for pipe, out in ((agent.stdout, sys.stdout), (agent.stderr, sys.stderr))
        ]
        waiters = [
            threading.Thread(target=self._wait, args=(rank,), daemon=True)
            for rank in range(len(self._agents))
        ]
        for thread in (*self._readers, *waiters):
            thread.start()

    def finish(self) -> int:
        """Waits for all ranks; ends the others after one has failed."""
        handlers = {
            number: signal.signal(number, self._on_signal)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        }
        # In the background there is nothing to read; the signal would stop the launcher.
        handlers[signal.SIGTTIN] = signal.signal(signal.SIGTTIN, signal.SIG_IGN)
        next_step: tuple[float, int] | None = None  # seconds until a signal is due to all
        try:
            while self._running:
                try:
                    kind, rank, code = self._events.get(timeout=next_step and next_step[0])
                except queue.Empty:
                    self._signal_all(next_step[1])
                    next_step = (STOP_SECONDS, signal.SIGKILL)
                    continue
                if kind == "signal":
                    again = self.told_to_stop
                    self.told_to_stop = True
                    self._signal_all(signal.SIGKILL if again else code)
                    continue
                self._running.discard(rank)
                if code and not self._code:
                    self._code = code
                    _say(f"rank {rank} ({self.job.hosts.hosts[rank].ssh}) ended with {code}")
                    next_step = next_step or (GRACE_SECONDS, signal.SIGTERM)
            for reader in self._readers:
                reader.join(timeout=STOP_SECONDS)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return self._code

    def _start_agent(self, host: Host) -> subprocess.Popen:
        if host.is_local:
            # Without site-packages, which an agent does not need, it starts a third sooner.
            command = [sys.executable, "-S", "-m", "comm.agent"]
        else:
            folder = shlex.quote(self.job.cwd)
            remote = f"cd {folder} 2>/dev/null; exec {shlex.quote(self.job.python)} -m comm.agent"
            command = [*shlex.split(self.job.ssh), host.ssh, remote]
        pipe = subprocess.PIPE
        # A session of its own: Ctrl-C in the terminal reaches the launcher alone, which passes
        # it on once.
        return subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True,
            env=agent_environment(),
        )  # fmt: skip

    def _greeting(self, rank: int) -> dict[str, Any]:
        agent, host = self._agents[rank], self.job.hosts.hosts[rank]
        all_local = all(one.is_local for one in self.job.hosts.hosts)
        self._tell(rank, {"ips": host.ips, "all_local": all_local, "num_extra_ports": 1})
        for line in agent.stdout:
            text = line.decode(errors="replace")
            if text.startswith(GREETING):
                return json.loads(text.removeprefix(GREETING))
        reason = agent.stderr.read().decode(errors="replace").strip()
        raise ValueError(f"rank {rank} cannot be started on {host.ssh}: {reason}")

    def _tell(self, rank: int, message: Any) -> None:
        try:
            self._agents[rank].stdin.write(json.dumps(message).encode() + b"\n")
            self._agents[rank].stdin.flush()
        except BrokenPipeError:
            pass  # its exit code tells

    def _forward_input(self) -> None:
        """Sends rank 0 what is typed here; os.read, as a thread in sys.stdin's lock disturbs the exit."""
        try:
            while chunk := os.read(0, 65536):
                self._tell(0, {"input": chunk.decode("latin-1")})
        except OSError:
            pass  # closed, or a terminal whose foreground is another job
        self._tell(0, {"input": ""})

    def _signal_all(self, number: int) -> None:
        for rank in self._running:
            self._tell(rank, {"signal": number})

    def _on_signal(self, number: int, frame: Any) -> None:
        self._events.put(("signal", -1, number))

    def _wait(self, rank: int) -> None:
        code = self._agents[rank].wait()
        self._events.put(("end", rank, code if code >= 0 else 128 - code))

    def _copy(self, rank: int, pipe: BinaryIO, out: Any) -> None:
        mpi = self.job.backend == "mpi"  # whose mpirun writes [rank]<stdout>: itself
        prefix = b"" if mpi or not self.job.prefix else f"[{rank}] ".encode()
        for line in pipe:
            if mpi:
                line = MPI_PREFIX.sub(rb"\1 " if self.job.prefix else b"", line)
            with self._lock:
                out.buffer.write(prefix + line.rstrip(b"\n") + b"\n")
                out.buffer.flush()


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


def agent_environment() -> dict[str, str]:
    """This process's environment, in which the agent finds this package."""
    root = str(Path(__file__).parents[1])
    path = os.environ.get("PYTHONPATH", "")
    return {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{path}" if path else root}


def _say(text: str) -> None:
    print(f"comm launch: {text}", file=sys.stderr, flush=True)
