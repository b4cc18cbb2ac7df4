"""The launcher's hand on a host: starts one rank's program there and ends it when told to.

Runs as `python -m comm.launcher.agent`, locally or over ssh, and speaks JSON lines on stdin: first the
addresses to reserve, then the order to start, then signals and what is typed at the launcher.
Its first line of output is its greeting. When stdin closes, because the launcher or the
connection is gone, the program and all it started are ended. Nothing here imports MLX or waits in
a loop.
"""

import ctypes
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from comm.addresses import host_address, is_reachable_ipv4, reserve_ports
from comm.agent_watch import AGENT

GREETING = "comm-agent "
ORPHAN_SECONDS = 3.0  # from SIGTERM to SIGKILL once the launcher is gone
PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serves one launcher until the program has ended."""
    with ExitStack() as held:
        request = _read()
        addresses = own_ips(request, os.environ)
        control = addresses["control"]
        wanted = [addresses["ips"], addresses["ips"][:1] * request["num_extra_ports"]]
        try:
            ports, extra = held.enter_context(reserve_ports(wanted))
        except OSError as error:
            names = ", ".join(addresses["ips"])
            sys.exit(f"{names} must be addresses of {socket.gethostname()} itself: {error.strerror}")
        greeting = {"control": control, "ring": ports, "extra": extra}
        print(GREETING + json.dumps(greeting), flush=True)
        order = _read()
        folder = held.enter_context(tempfile.TemporaryDirectory(prefix="comm-"))
        time.sleep(order["delay_seconds"])
        process = start(order, folder)
        threading.Thread(target=_obey, args=(process,), daemon=True).start()
        code = process.wait()
        kill_group(process, signal.SIGKILL)  # what the program left behind
        sys.stdout.flush()
    # Not sys.exit: the thread above still reads stdin, on which the interpreter would wait.
    os._exit(code if code >= 0 else 128 - code)


def own_ips(request: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """The addresses of this host: the hostfile's, and for control the one that ssh came in on.

    That may be one of IPv6, or the host's own to itself, which no other host can use; then the address on the network
    of the default route is taken.
    """
    ips = request["ips"]
    if request["all_local"]:
        return {"ips": ips or ["127.0.0.1"], "control": (ips or ["127.0.0.1"])[0]}
    server = environ.get("SSH_CONNECTION", "").split()
    came_in = server[2] if len(server) == 4 else ""
    control = came_in if is_reachable_ipv4(came_in) else host_address()
    return {"ips": ips or [control], "control": control}


def start(order: Mapping[str, Any], folder: str) -> subprocess.Popen:
    """Starts the program in a session of its own, so that all its children can be ended."""
    variables = {**os.environ, **order["variables"]}
    variables |= {"PATH": own_path(variables), AGENT: str(os.getpid())}
    for name, content in order["files"].items():
        path = Path(folder, name)
        path.write_text(json.dumps(content))
        variables[name] = str(path)
    cwd = order["cwd"] if os.path.isdir(order["cwd"]) else None
    command = order["command"]
    try:
        return subprocess.Popen(
            command,
            env=variables,
            cwd=cwd,
            stdin=subprocess.PIPE if order["takes_input"] else subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
    except OSError as error:
        print(f"{command[0]} cannot be started: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(127)


def own_path(environ: Mapping[str, str]) -> str:
    """`PATH` with this interpreter's folder first, so that `python` in the command is this one too."""
    folder = os.path.dirname(sys.executable)
    folders = environ.get("PATH", os.defpath).split(os.pathsep)
    return os.pathsep.join([folder, *(other for other in folders if other != folder)])


def kill_group(process: subprocess.Popen, number: int) -> None:
    """Sends a signal to the program and everything that it started."""
    try:
        os.killpg(process.pid, number)
        os.killpg(process.pid, signal.SIGCONT)  # a program that was stopped hears of it only then
    except (ProcessLookupError, PermissionError):
        pass  # all of them have ended


class StoppedSince:
    """How long the program has been held by SIGSTOP or SIGTSTP, from one look to the next.

    Args:
        group: The process group of the program and its children.
    """

    def __init__(self, group: int):
        self._group = group
        self._since: float | None = None

    def seconds(self) -> float:
        """Looks again; 0.0 where no process of the group is stopped now."""
        now = time.monotonic()
        if not is_stopped(self._group):
            self._since = None
        elif self._since is None:
            self._since = now
        return now - self._since if self._since is not None else 0.0


def is_stopped(group: int) -> bool:
    """Whether a process of a group is held by a signal, as `ps` says."""
    done = subprocess.run(["ps", "-A", "-o", "pgid=,state="], capture_output=True, text=True)
    processes = (line.split() for line in done.stdout.splitlines())
    return any(words[0] == str(group) and words[1].startswith("T") for words in processes if len(words) == 2)


def _obey(process: subprocess.Popen) -> None:
    """Passes signals and input on; an end of the input means that the launcher is gone."""
    typed: queue.SimpleQueue[str] = queue.SimpleQueue()
    if process.stdin:
        # Apart, so that a program that does not read holds no signal up.
        threading.Thread(target=_type, args=(process.stdin, typed), daemon=True).start()
    stopped = StoppedSince(process.pid)
    while line := sys.stdin.readline():
        message = json.loads(line)
        if "signal" in message:
            kill_group(process, message["signal"])
        elif "end_if_stopped_for" in message:
            if stopped.seconds() >= message["end_if_stopped_for"]:
                print("comm: this rank is stopped, while others have ended", file=sys.stderr, flush=True)
                kill_group(process, signal.SIGKILL)
        else:
            typed.put(message["input"])
    kill_group(process, signal.SIGTERM)  # mpirun ends its ranks only on this one
    time.sleep(ORPHAN_SECONDS)
    kill_group(process, signal.SIGKILL)


def _type(program: BinaryIO, typed: "queue.SimpleQueue[str]") -> None:
    """Writes what was typed to the program's stdin, until the empty text that ends it."""
    try:
        while text := typed.get():
            program.write(text.encode("latin-1"))
            program.flush()
        program.close()
    except BrokenPipeError:
        pass  # the program reads no more


def _read() -> Any:
    line = sys.stdin.readline()
    if not line:
        os._exit(1)
    return json.loads(line)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
