"""Machines out of Linux network namespaces: what one host cannot show of several, it shows here.

Each machine has a network stack, a host name and an ssh server of its own, an address on a common network
(10.77.0.N), and, towards the next one, a cable: a network of its own that these two reach and nobody else, as with
Thunderbolt. The laptop `hub` is on the common network only. All share this host's disk and cores. Namespaces are
named after this process, so several test runs do not meet; nothing outside of them is changed.
"""

import os
import platform
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from ranks import slowness


def why_not() -> str:
    """Why there can be no desk here, "" where there can."""
    if platform.system() != "Linux":
        return "network namespaces exist on Linux only"
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "unshare", "ssh", "ssh-keygen", "/usr/sbin/sshd") if not shutil.which(tool)]
    if missing:
        return f"{', '.join(missing)} missing: apt-get install iproute2 openssh-server"
    trial = f"desk-trial-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", trial], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespace can be made: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", trial], check=True)
    return ""


class Desk:
    """`count` machines, up from construction to `close`.

    Args:
        count: How many.
        cables: How many cables there are from each machine to the next, and from the last to the first where there are
            three or more.
        name: Differs between desks that one process has at the same time.
    """

    def __init__(self, count: int, cables: int = 0, name: str = ""):
        self.names = [f"d{os.getpid()}{name}-{index}" for index in range(count)]
        self.hub = f"d{os.getpid()}{name}-hub"
        self.folder = Path(tempfile.mkdtemp(prefix="desk-"))
        pairs = [(i, (i + 1) % count) for i in range(count if count > 2 else count - 1)]
        self.cables = [pair for pair in pairs for _ in range(cables)]
        self._started: list[subprocess.Popen[Any]] = []
        try:
            self._make_network()
            self._make_cables()
            self._start_servers()
        except BaseException:
            self.close()
            raise

    @property
    def ssh(self) -> str:
        """The command by which `hub` reaches the machines."""
        return f"ssh -F {self.folder}/config"

    def hosts(self) -> list[dict[str, Any]]:
        """A host file: the addresses on the cables to the machine before, or the one on the common network."""
        rows = []
        for index in range(len(self.names)):
            here, pair = f"10.77.0.{index + 1}", {(index - 1) % len(self.names), index}
            ends = [(number, one) for number, one in enumerate(self.cables) if set(one) == pair]
            ips = [f"10.78.{number}.{1 + one.index(index)}" for number, one in ends]
            rows.append({"ssh": here, "ips": ips or [here]})
        return rows

    def start(self, *command: str, **options: Any) -> subprocess.Popen[str]:
        """Starts a command on `hub`, its output in one pipe."""
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.hub, *command],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options,
        )  # fmt: skip
        self._started.append(process)
        return process

    def cut(self, number: int) -> None:
        """Pulls the cable with this number out."""
        _on(self.names[self.cables[number][0]], "ip", "link", "set", f"tb{number}", "down")

    def unplug(self, index: int) -> None:
        """Takes a machine off the common network without a word, as a power cut does."""
        _on(self.names[index], "ip", "link", "set", "en0", "down")

    def close(self) -> None:
        """Ends what runs on the machines, and takes them down."""
        spaces = [*self.names, self.hub]
        for name in spaces:
            listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
            for pid in listed.stdout.split():
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    pass
        for process in self._started:
            process.wait()
            if process.stdout:
                process.stdout.close()
        for name in spaces:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _make_network(self) -> None:
        for name in (self.hub, *self.names):
            _run("ip", "netns", "add", name)
            _on(name, "ip", "link", "set", "lo", "up")
        _on(self.hub, "ip", "link", "add", "br0", "type", "bridge")
        _on(self.hub, "ip", "addr", "add", "10.77.0.254/24", "dev", "br0")
        _on(self.hub, "ip", "link", "set", "br0", "up")
        for index, name in enumerate(self.names):
            _on(self.hub, "ip", "link", "add", f"port{index}", "type", "veth", "peer", "name", "en0", "netns", name)
            _on(self.hub, "ip", "link", "set", f"port{index}", "master", "br0", "up")
            _on(name, "ip", "addr", "add", f"10.77.0.{index + 1}/24", "dev", "en0")
            _on(name, "ip", "link", "set", "en0", "up")

    def _make_cables(self) -> None:
        for number, pair in enumerate(self.cables):
            one, other = (self.names[index] for index in pair)
            device = f"tb{number}"
            _on(one, "ip", "link", "add", device, "type", "veth", "peer", "name", device, "netns", other)
            for end, name in enumerate((one, other), start=1):
                _on(name, "ip", "addr", "add", f"10.78.{number}.{end}/24", "dev", device)
                _on(name, "ip", "link", "set", device, "up")

    def _start_servers(self) -> None:
        Path("/run/sshd").mkdir(exist_ok=True)
        for key in ("host", "user"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key))
        server = f"HostKey {self.folder}/host\nAuthorizedKeysFile {self.folder}/user.pub\nStrictModes no\nPidFile none\n"
        # A home of its own: what a shell does in the user's takes time, and waits for locks that killed ones left.
        server += f"PermitRootLogin yes\nPasswordAuthentication no\nMaxStartups 100\nSetEnv HOME={self.folder}\n"
        (self.folder / "server").write_text(server)
        client = f"Host *\nUser root\nIdentityFile {self.folder}/user\nBatchMode yes\nStrictHostKeyChecking no\n"
        (self.folder / "config").write_text(f"{client}UserKnownHostsFile /dev/null\nLogLevel ERROR\n")
        for name in self.names:
            serve = f"hostname {name}; exec /usr/sbin/sshd -D -e -f {self.folder}/server"
            log = (self.folder / f"{name}.log").open("w")
            with log:
                command = ["ip", "netns", "exec", name, "unshare", "-u", "sh", "-c", serve]
                self._started.append(subprocess.Popen(command, stdout=log, stderr=log))
        for index in range(len(self.names)):
            self._wait_for(f"10.77.0.{index + 1}")

    def _wait_for(self, address: str) -> None:
        deadline = time.monotonic() + 60 * slowness()
        command = ["ip", "netns", "exec", self.hub, *self.ssh.split(), address, "true"]
        while subprocess.run(command, stderr=subprocess.DEVNULL).returncode:
            assert time.monotonic() < deadline, f"no ssh server answers on {address}"
            time.sleep(0.1)


def _on(name: str, *command: str) -> None:
    _run("ip", "netns", "exec", name, *command)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
