"""The launcher with real processes: exit codes, prefixes, signals, orphans, restarts, settings."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from comm.addresses import host_address
from ranks import slowness

WORKERS = Path(__file__).parent / "workers"
ROOT = Path(__file__).parents[2]
JOB = (sys.executable, str(WORKERS / "job.py"))


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def launch(
    *arguments: str, timeout: float = 60, typed: str | None = None
) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "comm", "launch", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout * slowness(),
        input=typed,
    )  # fmt: skip


def start_sleepers(folder: Path, num_ranks: int) -> tuple[subprocess.Popen, list[int]]:
    command = [sys.executable, "-m", "comm", "launch", "-n", str(num_ranks), "--", *JOB, "sleep"]
    launcher = subprocess.Popen([*command, str(folder)], cwd=ROOT, env=environment())
    wait_for(lambda: len(list(folder.glob("*.pid"))) == num_ranks, "the ranks to start")
    return launcher, [int(path.stem) for path in folder.glob("*.pid")]


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 20) -> None:
    seconds *= slowness()
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.parametrize("backend", ["ring", "mpi"])
def test_ranks_join_and_lines_carry_their_rank(backend: str) -> None:
    """Catches ranks that do not find each other, and output that cannot be told apart."""
    done = launch("-n", "2", "--backend", backend, "--", *JOB, "sum")
    assert done.returncode == 0, done.stderr
    lines = sorted(line for line in done.stdout.splitlines() if "rank" in line)
    assert lines == [f"[{r}] rank {r} of 2 on {backend}: 2.0" for r in range(2)], done.stdout


def test_the_first_failing_ranks_exit_code_is_returned() -> None:
    """Catches a failed job that looks like success to a script."""
    done = launch("-n", "2", "--", *JOB, "fail", "7")
    assert done.returncode == 7, done.stderr
    assert "rank 1 (127.0.0.1) ended with 7" in done.stderr


def test_what_is_typed_reaches_rank_zero_whole() -> None:
    """Catches input that is lost, cut in the middle of a character, given to all ranks, or never ended."""
    typed = "\u00e9\n" * 70_000
    done = launch("-n", "2", "--", *JOB, "read", typed=typed)
    assert done.returncode == 0, done.stderr
    digest = hashlib.sha256(typed.encode()).hexdigest()
    assert sorted(done.stdout.splitlines()) == [f"[0] {digest}", f"[1] {hashlib.sha256().hexdigest()}"]


def test_input_that_nobody_reads_holds_nothing_up() -> None:
    """Catches a full pipe on which the launcher or its agents wait."""
    assert launch("-n", "2", "--", *JOB, "environment", typed="x" * 500_000).returncode == 0


def test_a_failed_job_is_restarted(tmp_path: Path) -> None:
    """Catches --max-restarts that gives up early or restarts only one rank."""
    done = launch("-n", "2", "--max-restarts", "2", "--", *JOB, "once", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "restart 1 of 2" in done.stderr and "rank 1 of 2" in done.stdout


def test_what_the_user_wrote_wrong_is_not_tried_again() -> None:
    """Catches endless restarts of a job whose recipe is refused (exit code 2)."""
    done = launch("-n", "2", "--max-restarts", "3", "--", *JOB, "fail", "2")
    assert done.returncode == 2 and "restart" not in done.stderr, done.stderr


def test_signals_reach_the_ranks(tmp_path: Path) -> None:
    """Catches ranks that cannot save before they end, and an exit code that hides it."""
    launcher, pids = start_sleepers(tmp_path, 2)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=20 * slowness()) == 143
    assert not any(is_alive(pid) for pid in pids)


def test_a_killed_launcher_leaves_no_orphan(tmp_path: Path) -> None:
    """Catches ranks that live on, with the GPU's memory, after kill -9 of the launcher."""
    launcher, pids = start_sleepers(tmp_path, 2)
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not any(is_alive(pid) for pid in pids), "the ranks to end")


def test_a_stopped_rank_ends_with_the_job() -> None:
    """Catches a rank that SIGSTOP holds, and with it the job, beyond the time-out and ten seconds."""
    command = [sys.executable, "-m", "comm", "launch", "-n", "2", "--timeout", "3", "--"]
    command += [sys.executable, str(WORKERS / "failing.py"), "stop", "1"]
    limit = 60 * slowness()
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as launcher:
        assert "joined" in launcher.stdout.readline()
        start = time.monotonic()
        _, errors = launcher.communicate(timeout=limit)
    assert launcher.returncode == 1
    assert "rank 1" in errors and "has not answered for 3 s" in errors
    assert time.monotonic() - start < 3 + 10


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_the_launcher_does_not_spin(tmp_path: Path) -> None:
    """Catches a busy loop: launcher and agents together use under 2 % of a core."""
    launcher, _ = start_sleepers(tmp_path, 4)
    try:
        before, start = cpu_seconds(launcher.pid), time.monotonic()
        time.sleep(2)
        share = (cpu_seconds(launcher.pid) - before) / (time.monotonic() - start)
    finally:
        launcher.terminate()
        launcher.wait(timeout=20 * slowness())
    assert share < 0.02, f"{share:.1%} of a core"


def cpu_seconds(launcher: int) -> float:
    ticks = 0
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for pid in (launcher, *map(int, children)):
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def test_jaccl_hostfile_over_ssh(tmp_path: Path) -> None:
    """Catches MLX's JACCL hostfiles, without ips above rank 0, failing; and a leaked secret."""
    hostfile = tmp_path / "hosts.json"
    hosts = [
        {"ssh": "mac-a", "ips": ["127.0.0.1"], "rdma": [None, "rdma_en2"]},
        {"ssh": "mac-b", "ips": [], "rdma": ["rdma_en3", None]},
    ]
    hostfile.write_text(json.dumps({"backend": "jaccl", "envs": ["T_X=a b"], "hosts": hosts}))
    log = tmp_path / "log"
    ssh = tmp_path / "ssh"
    ssh.write_text(f'#!/bin/sh\necho "$@" >>{log}\nexec {WORKERS / "fake_ssh.sh"} "$@"\n')
    ssh.chmod(0o755)
    options = ("--hostfile", str(hostfile), "--ssh", str(ssh), "--python", sys.executable)
    done = launch(*options, "--timeout", "77", "--", *JOB, "environment")
    assert done.returncode == 0, done.stderr
    got = {}
    for line in done.stdout.splitlines():
        prefix, _, text = line.partition(" RESULT ")
        got[prefix] = json.loads(text)
    first, second = got["[0]"], got["[1]"]
    assert first["MLX_RANK"] == "0" and second["MLX_RANK"] == "1"
    assert first["COMM_BACKEND"] == "jaccl" and first["COMM_TIMEOUT"] == "77"
    assert first["MLX_IBV_DEVICES"] == [[None, "rdma_en2"], ["rdma_en3", None]]
    assert first["MLX_JACCL_COORDINATOR"].startswith("127.0.0.1:")
    assert [len(row) for row in second["MLX_HOSTFILE"]] == [1, 1], "ring for control"
    assert json.loads(second["COMM_ADDRESSES"]) == [host_address()] * 2, "ssh came in on the host's own address to itself"
    assert second["T_X"] == "a b"
    assert len(first["COMM_SECRET"]) == 64 and first["COMM_SECRET"] == second["COMM_SECRET"]
    assert first["COMM_SECRET"] not in log.read_text() + done.stderr


def test_a_host_that_cannot_be_reached_is_named() -> None:
    """Catches a launcher that waits for ever, or shows only a stack trace."""
    done = launch("--hosts", "127.0.0.1,nowhere", "--ssh", "/bin/false", "--", *JOB, "sum")
    assert done.returncode == 1 and "rank 1 cannot be started on nowhere" in done.stderr


def test_a_program_that_does_not_exist_is_named() -> None:
    """Catches an unclear error for a misspelt command."""
    done = launch("-n", "2", "--", "/no/such/program")
    assert done.returncode == 127 and "/no/such/program cannot be started" in done.stderr


def test_mlx_launch_and_no_launcher() -> None:
    """Catches `comm.init` failing under mlx.launch (whose -n 1 hostfile is empty) or alone."""
    program = str(Path(sys.executable).parent / "mlx.launch")
    starts = {
        f"rank 0 of {n} on ring: {n}.0": [program, "-n", str(n), *JOB, "sum"] for n in (1, 2)
    }
    starts["rank 0 of 1 on none: 1.0"] = [*JOB, "sum"]
    running = {
        words: subprocess.Popen(
            command, cwd=ROOT, env=environment(), text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for words, command in starts.items()
    }  # fmt: skip
    for words, process in running.items():
        assert words in process.communicate(timeout=60 * slowness())[0]


def test_a_rank_that_is_stopped_after_the_others_have_ended(tmp_path: Path) -> None:
    """Catches a launcher that waits for ever for a rank that nobody needs any more."""
    program = "import os, signal\nif os.environ['MLX_RANK'] == '1': os.kill(os.getpid(), signal.SIGSTOP)\n"
    began = time.monotonic()
    done = launch("-n", "2", "--timeout", "1", "--", sys.executable, "-c", program)
    assert done.returncode == 137, done.stderr
    assert "[1] comm: this rank is stopped" in done.stderr
    assert time.monotonic() - began < 11


def test_a_rank_that_works_on_after_the_others_have_ended() -> None:
    """Catches a rank that is taken for stopped, as it ends later than the rest."""
    program = "import os, time\nif os.environ['MLX_RANK'] == '1': time.sleep(3)\n"
    done = launch("-n", "2", "--timeout", "1", "--", sys.executable, "-c", program)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("place", ["full disk", "no reader"])
def test_output_that_cannot_be_passed_on(place: str) -> None:
    """Catches a launcher that stops reading when it cannot write: the ranks would wait on a full pipe for ever."""
    program = "for i in range(20000): print('a line of some length')\nraise SystemExit(7)"
    command = [sys.executable, "-m", "comm", "launch", "-n", "2", "--", sys.executable, "-c", program]
    reader, writer = os.pipe()
    os.close(reader)
    out = open("/dev/full", "wb") if place == "full disk" else open(writer, "wb")
    with out, open(writer if place == "full disk" else os.devnull, "wb"):
        done = subprocess.run(
            command, cwd=ROOT, env=environment(), stdout=out, stderr=subprocess.PIPE, text=True, timeout=60 * slowness()
        )
    assert done.returncode == 7, done.stderr
    assert done.stderr.count("output cannot be passed on") == 1, done.stderr


def test_a_line_without_end_is_passed_on() -> None:
    """Catches a launcher whose memory grows with a line that never ends."""
    done = launch("-n", "1", "--", sys.executable, "-c", "print('x' * 200_000)")
    assert done.returncode == 0 and done.stdout.count("x") == 200_000
    assert max(map(len, done.stdout.splitlines())) < 70_000


@pytest.mark.parametrize(
    "options",
    [
        ["--timeout", "inf"],
        ["--timeout", "-1"],
        ["--timeout", "x"],
        ["--ssh", ""],
        ["--ssh", "'"],
        ["--ssh", "no-such-ssh"],
        ["--hosts=-oProxyCommand=touch /tmp/x,b"],
        ["--hosts", "a,,b"],
        ["--backend", "jaccl", "-n", "2"],
        ["--backend", "jaccl-ring", "-n", "2"],
    ],
    ids=" ".join,
)
def test_options_that_mean_nothing(options: list[str]) -> None:
    """Catches a traceback, or a job that starts and cannot end, where the user mistyped."""
    done = launch("-n", "1", *options, "--", *JOB, "environment")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert options[0].partition("=")[0] in done.stderr


@pytest.mark.parametrize("second", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_the_terminal_goes_away(tmp_path: Path, second: signal.Signals) -> None:
    """Catches ranks that are killed while they save, as another signal came after the first SIGHUP."""
    program = (
        "import os, pathlib, signal, sys, time\n"
        "def save(number, frame):\n"
        "    time.sleep(2)\n"
        "    pathlib.Path(sys.argv[1], 'saved-' + os.environ['MLX_RANK']).touch()\n"
        "    os._exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-m", "comm", "launch", "-n", "2", "--max-restarts", "1", "--"]
    command += [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE) as launcher:
        assert all("ready" in launcher.stdout.readline() for _ in range(2))
        launcher.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        launcher.send_signal(second)
        assert launcher.wait(timeout=30 * slowness()) == 143
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved-0", "saved-1"]


def test_a_rank_that_is_stopped_for_a_moment(tmp_path: Path) -> None:
    """Catches a rank that is ended since it is looked at just while it is stopped, which a debugger does."""
    program = (
        "import os, signal, subprocess, sys, time\n"
        "if os.environ['MLX_RANK'] == '0': sys.exit()\n"
        "for _ in range(6):\n"
        "    subprocess.Popen(['sh', '-c', f'sleep 0.5; kill -CONT {os.getpid()}'])\n"
        "    os.kill(os.getpid(), signal.SIGSTOP)\n"
        "    time.sleep(0.5)\n"
    )
    done = launch("-n", "2", "--timeout", "2", "--", sys.executable, "-c", program)
    assert done.returncode == 0, done.stderr


def test_a_host_that_does_not_say_a_word(tmp_path: Path) -> None:
    """Catches a launcher that waits without end for a host whose ssh hangs."""
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nsleep 60\n")
    silent.chmod(0o755)
    began = time.monotonic()
    done = launch("--hosts", "a,127.0.0.1", "--timeout", "2", "--ssh", str(silent), "--", "true")
    assert done.returncode == 1 and "rank 0 cannot be started on a" in done.stderr, done.stderr
    assert "did not answer within 2 s" in done.stderr and time.monotonic() - began < 2 + 10


def test_an_address_that_is_another_hosts(tmp_path: Path) -> None:
    """Catches a traceback for a hostfile of other machines."""
    hosts = tmp_path / "hosts.json"
    hosts.write_text('[{"ssh": "127.0.0.1", "ips": ["192.0.2.7"]}]')
    done = launch("--hostfile", str(hosts), "--", "true")
    assert done.returncode == 1 and "192.0.2.7 must be addresses of" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_an_mpirun_that_waits_for_itself_is_ended() -> None:
    """Catches a launcher that waits without end for an mpirun that has told of a failed rank and then hangs."""
    program = "echo 'prterun detected that one or more processes exited with non-zero status'; sleep 60"
    code = (
        "import sys; from comm.launcher.hostfile import Host, HostList; from comm.launcher.job import Job\n"
        "from comm.launcher.launch import launch\n"
        f"sys.exit(launch(Job(('sh', '-c', {program!r}), HostList((Host('127.0.0.1'),)), 'mpi', timeout_seconds=1)))"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), timeout=60 * slowness())
    assert done.returncode == 143 and time.monotonic() - began < 1 + 10
