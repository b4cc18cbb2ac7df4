"""The launcher's hand on a host: which addresses and which interpreter it chooses there."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from comm.addresses import host_address
from comm.agent_watch import watch_agent
from comm.launcher.agent import own_ips, own_path
from comm.launcher.job import Job
from ranks import ROOT, slowness

REMOTE = {"ips": [], "all_local": False}


@pytest.mark.parametrize(
    ("came_in", "is_taken"),
    [("10.1.2.3", True), ("169.254.7.7", True), ("127.0.0.1", False), ("fe80::1c2d%en0", False), ("2001:db8::7", False), ("", False)],
)
def test_the_control_address_is_one_that_others_reach(came_in: str, is_taken: bool) -> None:
    """Catches an IPv6 address, usual for names in .local, or a host's own to itself handed to the other hosts."""
    environ = {"SSH_CONNECTION": f"10.1.2.9 50000 {came_in} 22"} if came_in else {}
    control = came_in if is_taken else host_address()
    assert own_ips(REMOTE, environ) == {"ips": [control], "control": control}
    assert own_ips(REMOTE | {"ips": ["192.168.0.4"]}, environ) == {"ips": ["192.168.0.4"], "control": control}


def test_python_in_the_command_is_the_interpreter_of_the_job() -> None:
    """Catches the stub of a system's Python that a shell without the user's profile finds first, or none."""
    folders = own_path({"PATH": f"/usr/bin{os.pathsep}{Path(sys.executable).parent}"}).split(os.pathsep)
    assert folders == [str(Path(sys.executable).parent), "/usr/bin"]
    assert shutil.which("python", path=own_path({})) == str(Path(sys.executable).parent / "python")
    command = [sys.executable, "-m", "comm", "launch", "--", "python", "-c", "import sys; print(sys.executable)"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert Path(sys.executable).parent == Path(done.stdout.removeprefix("[0] ").strip()).parent, done.stdout + done.stderr


def test_other_hosts_run_this_interpreter_by_default() -> None:
    """Catches `python3` of another host's system."""
    assert Job.python == sys.executable


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_rank_behind_a_shell_ends_with_its_agent(tmp_path: Path) -> None:
    """Catches a rank that goes on for ever once its agent was killed: the kernel ends the agent's own child at most."""
    program = "import os, time, comm; comm.init(); print('up', os.getpid(), os.environ['COMM_AGENT'], flush=True); time.sleep(600)"
    command = [sys.executable, "-m", "comm", "launch", "--", "sh", "-c", f"'{sys.executable}' -c \"{program}\"; true"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as launcher:
        _, _, rank, agent = launcher.stdout.readline().split()
        os.kill(int(agent), signal.SIGKILL)
        deadline = time.monotonic() + 10 * slowness()
        while Path(f"/proc/{rank}").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not Path(f"/proc/{rank}").exists()
        assert launcher.wait(timeout=30 * slowness()) == 137


def test_without_an_agent_nothing_is_watched() -> None:
    """Catches a program of its own, or one under another launcher, that is ended."""
    assert watch_agent({}) is None
