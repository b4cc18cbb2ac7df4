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
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from comm.launcher.agent import GREETING
from comm.launcher.hostfile import Host
from comm.launcher.job import Job, make_orders, remote_line, ssh_words

GRACE_SECONDS = 6.0  # for the watchdogs to name the missing rank, once one has failed
STOP_SECONDS = 5.0  # from SIGTERM to SIGKILL, and from that to giving the host up
LONGEST_LINE_BYTES = 1 << 16  # of what a rank prints; a longer one is passed on in pieces
MPI_PREFIX = re.compile(rb"^(\[\d+\])<std(?:out|err)>: ?")
SSH_ERROR = 255  # of ssh itself
MPI_FAILED = b"detected that one or more processes"  # exited with an error; mpirun may then wait for itself without end
USER_ERROR = 2  # what the user wrote is wrong: starting again would not help


def launch(job: Job) -> int:
    """Runs the job, restarting it as allowed; returns the first failing rank's exit code."""
    for attempt in range(job.max_restarts + 1):
        run = Run(job, attempt)
        code = run.finish()
        if code in (0, USER_ERROR) or run.told_to_stop or attempt == job.max_restarts:
            return code
        _say(f"the job failed with exit code {code}; restart {attempt + 1} of {job.max_restarts}")
    return code


@dataclass(frozen=True)
class _Due:
    """What is done after so many seconds without an event."""

    seconds: float
    act: Callable[[], None]


class Run:
    """One attempt: starts every rank on construction.

    Args:
        job: What to start.
        attempt: Restarts before this one. In the first, 0, rank 0 reads what this process reads.
    """

    def __init__(self, job: Job, attempt: int):
        self.job = job
        self._is_mpi = job.backend == "mpi"  # whose mpirun writes [rank]<stdout>: itself
        takes_input = attempt == 0
        self.told_to_stop = False
        self._events: queue.Queue[tuple[str, int, int]] = queue.Queue()
        self._lock = threading.Lock()
        self._unwritable: set[Any] = set()
        self._code = self._num_asked = 0
        self._due: list[_Due] = []  # what is done when nothing else happens, one after the other
        self._agents = [self._start_agent(host) for host in job.hosts.hosts]
        self._running = set(range(len(self._agents)))
        greetings = self._greetings()
        orders = make_orders(job, greetings, secrets.token_hex(32), attempt) if greetings else []
        self._is_started = bool(orders)
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
        handled = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup leaves it
            handled.append(signal.SIGHUP)
        handlers = {number: signal.signal(number, self._on_signal) for number in handled}
        # In the background there is nothing to read; the signal would stop the launcher.
        handlers[signal.SIGTTIN] = signal.signal(signal.SIGTTIN, signal.SIG_IGN)
        try:
            while self._running:
                try:
                    kind, rank, code = self._events.get(timeout=self._due[0].seconds if self._due else None)
                except queue.Empty:
                    self._due.pop(0).act()
                    continue
                if kind == "signal":
                    self._pass_on(code)
                elif kind == "lost":
                    self._give_up(rank)
                elif kind == "failed":
                    self._due = self._due or self._ends_after(self.job.timeout_seconds + GRACE_SECONDS)
                else:
                    self._note_end(rank, code)
            for reader in self._readers:
                reader.join(timeout=STOP_SECONDS)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return self._code

    def _pass_on(self, number: int) -> None:
        """A signal to the launcher: the ranks finish their step and save; a second one ends them at once."""
        # When the terminal goes away, which may be said twice, nobody is impatient.
        self._num_asked += number != signal.SIGHUP
        if self._num_asked > 1:
            self._signal_all(signal.SIGKILL)
        elif not self.told_to_stop:
            self._signal_all(signal.SIGTERM if number == signal.SIGHUP else number)
        self.told_to_stop = True

    def _note_end(self, rank: int, code: int) -> None:
        self._running.discard(rank)
        host = self.job.hosts.hosts[rank]
        if code == SSH_ERROR and self._is_started and not host.is_local:
            _say(f"rank {rank}: the connection to {host.ssh} is lost")
        if code and not self._code:
            self._code = code
            # mpirun is our only rank, and has told which of its own failed.
            _say(f"mpirun ended with {code}" if self._is_mpi else f"rank {rank} ({host.ssh}) ended with {code}")
            self._due = self._ends_after(GRACE_SECONDS)
            for other in self._running:
                threading.Thread(target=self._look_for, args=(other,), daemon=True).start()
        elif not self._due and self.job.timeout_seconds:
            self._end_stopped()

    def _ends_after(self, seconds: float) -> list[_Due]:
        """What ends the ranks that are left, step by step."""
        return [
            _Due(seconds, lambda: self._signal_all(signal.SIGTERM)),
            _Due(STOP_SECONDS, lambda: self._signal_all(signal.SIGKILL)),
            _Due(STOP_SECONDS, self._give_up_all),
        ]

    def _end_stopped(self) -> None:
        """Some ranks have ended as they should: one that is stopped since would hold the job for ever."""
        for rank in self._running:
            self._tell(rank, {"end_if_stopped_for": self.job.timeout_seconds})
        self._due = [_Due(self.job.timeout_seconds / 4, self._end_stopped)]

    def _look_for(self, rank: int) -> None:
        """Whether the rank's host still answers, once the job has failed."""
        host = self.job.hosts.hosts[rank]
        if host.is_local:
            return
        command = [*ssh_words(self.job.ssh, self.job.timeout_seconds), host.ssh, "true"]
        try:
            answers = not subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, timeout=GRACE_SECONDS
            ).returncode
        except subprocess.TimeoutExpired:
            answers = False
        if not answers:
            self._events.put(("lost", rank, 0))

    def _give_up(self, rank: int) -> None:
        if rank in self._running:
            _say(f"rank {rank}: {self.job.hosts.hosts[rank].ssh} does not answer and is given up")
            _kill(self._agents[rank])

    def _give_up_all(self) -> None:
        for rank in list(self._running):
            self._give_up(rank)

    def _start_agent(self, host: Host) -> subprocess.Popen:
        if host.is_local:
            # Without site-packages, which an agent does not need, it starts a third sooner.
            command = [sys.executable, "-S", "-m", "comm.launcher.agent"]
        else:
            line = remote_line(self.job.cwd, [self.job.python, "-m", "comm.launcher.agent"])
            command = [*ssh_words(self.job.ssh, self.job.timeout_seconds), host.ssh, line]
        pipe = subprocess.PIPE
        # A session of its own: Ctrl-C in the terminal reaches the launcher alone, which passes
        # it on once.
        return subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True,
            env=agent_environment(),
        )  # fmt: skip

    def _greetings(self) -> list[dict[str, Any]]:
        """What every agent says first; empty where one of them cannot, with the reason told and the others ended."""
        limit = self.job.timeout_seconds or None
        late = threading.Timer(limit, self._end_agents) if limit else None
        try:
            if late:
                late.start()
            return [self._greeting(rank) for rank in range(len(self._agents))]
        except ValueError as error:
            reason = str(error)
            if late and not late.is_alive():
                reason += f"it did not answer within {limit:g} s"
            _say(reason)
            self._end_agents()
            self._code = 1
            return []
        finally:
            if late:
                late.cancel()

    def _end_agents(self) -> None:
        for agent in self._agents:
            _kill(agent)

    def _greeting(self, rank: int) -> dict[str, Any]:
        agent, host = self._agents[rank], self.job.hosts.hosts[rank]
        all_local = all(one.is_local for one in self.job.hosts.hosts)
        self._tell(rank, {"ips": host.ips, "all_local": all_local, "num_extra_ports": 1})
        out, err = cast(BinaryIO, agent.stdout), cast(BinaryIO, agent.stderr)
        for line in out:
            text = line.decode(errors="replace")
            if text.startswith(GREETING):
                return json.loads(text.removeprefix(GREETING))
        reason = err.read().decode(errors="replace").strip()
        chosen = "" if host.is_local else f" with {self.job.python} (--python sets another)"
        raise ValueError(f"rank {rank} cannot be started on {host.ssh}{chosen}: {reason}")

    def _tell(self, rank: int, message: Any) -> None:
        try:
            pipe = cast(BinaryIO, self._agents[rank].stdin)
            pipe.write(json.dumps(message).encode() + b"\n")
            pipe.flush()
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
        prefix = b"" if self._is_mpi or not self.job.prefix else f"[{rank}] ".encode()
        while line := pipe.readline(LONGEST_LINE_BYTES):
            if self._is_mpi:
                if MPI_FAILED in line:
                    self._events.put(("failed", rank, 0))
                line = MPI_PREFIX.sub(rb"\1 " if self.job.prefix else b"", line)
            with self._lock:
                self._write(out, prefix + line.rstrip(b"\n") + b"\n")

    def _write(self, out: Any, data: bytes) -> None:
        """Passes a line on. Where nobody reads any more, or the disk is full, the ranks go on all the same."""
        if out in self._unwritable:
            return
        left = memoryview(data)
        try:
            while left:
                left = left[os.write(out.fileno(), left) :]
        except OSError as error:
            self._unwritable.add(out)
            _say(f"output cannot be passed on ({error.strerror}); the job goes on without")


def _kill(agent: subprocess.Popen) -> None:
    """Ends an agent, or the command that reaches it, with what that has started."""
    with suppress(ProcessLookupError):
        os.killpg(agent.pid, signal.SIGKILL)


def agent_environment() -> dict[str, str]:
    """This process's environment, in which the agent finds this package."""
    root = str(Path(__file__).parents[2])
    path = os.environ.get("PYTHONPATH", "")
    return {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{path}" if path else root}


def _say(text: str) -> None:
    try:
        os.write(2, f"comm launch: {text}\n".encode())
    except OSError:
        pass  # nobody reads; the exit code tells
