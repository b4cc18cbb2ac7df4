"""Hostfiles as MLX writes them, checked as a whole.

Either a list of {"ssh", "ips", "rdma"} or {"backend", "envs", "hosts": that list}. All mistakes
are reported at once. Nothing here imports MLX.
"""

import ipaddress
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comm.capabilities import CAPABILITIES

LOCAL = ("127.0.0.1", "localhost")


@dataclass(frozen=True)
class Host:
    """One rank's machine.

    Attributes:
        ssh: Name for ssh; 127.0.0.1 and localhost start without it.
        ips: IPv4 addresses that its ring neighbours connect to; may be empty.
        rdma: Its RDMA device (or devices, with several cables) towards each rank, None towards
            itself; empty without RDMA.
    """

    ssh: str
    ips: tuple[str, ...] = ()
    rdma: tuple[str | list[str] | None, ...] = ()

    @property
    def is_local(self) -> bool:
        """Started as a child process rather than over ssh."""
        return self.ssh in LOCAL


@dataclass(frozen=True)
class HostList:
    """A parsed hostfile: the backend it asks for or "", variables to set, and one host per rank."""

    hosts: tuple[Host, ...]
    backend: str = ""
    variables: tuple[tuple[str, str], ...] = ()


def read_hostfile(path: str) -> HostList:
    """Reads and checks a hostfile.

    Raises:
        ValueError: Everything that is wrong with it, one line each.
    """
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from None
    problems: list[str] = []
    hosts = _parse(content, problems)
    if hosts is not None:
        problems += check_hosts(hosts)
    if problems or hosts is None:
        raise ValueError("\n".join(f"{path}: {problem}" for problem in problems))
    return hosts


def check_hosts(hosts: HostList) -> list[str]:
    """What is wrong with the hosts for their backend, one sentence each."""
    problems = []
    if hosts.backend and hosts.backend not in CAPABILITIES:
        allowed = ", ".join(CAPABILITIES)
        problems.append(f"backend is {hosts.backend!r}; allowed are {allowed}.")
    if not hosts.hosts:
        problems.append("it names no hosts.")
    counts = Counter(host.ssh for host in hosts.hosts if not host.is_local)
    problems += [f"{name} is named {n} times." for name, n in counts.items() if n > 1]
    for rank, host in enumerate(hosts.hosts):
        problems += [
            f"rank {rank} ({host.ssh}): {ip!r} is no IPv4 address."
            for ip in host.ips
            if not _is_ipv4(ip)
        ]
    return problems + check_rdma(hosts)


def check_rdma(hosts: HostList) -> list[str]:
    """What is wrong with the table of RDMA devices, one sentence each."""
    table = [host.rdma for host in hosts.hosts]
    wanted = hosts.backend.startswith("jaccl")
    if not any(table) and not wanted:
        return []
    count = len(table)
    short = [rank for rank, row in enumerate(table) if len(row) != count]
    if short:
        return [
            f"rank {rank} ({hosts.hosts[rank].ssh}) has {len(table[rank])} rdma entries; "
            f"it needs {count}, one per rank."
            for rank in short
        ]
    problems = [
        f"rank {rank}'s rdma entry for itself is {row[rank]!r}; it must be null."
        for rank, row in enumerate(table)
        if row[rank] is not None
    ]
    for i in range(count):
        for j in range(i + 1, count):
            there, back = table[i][j], table[j][i]
            if (there is None) != (back is None):
                without = (i, j) if there is None else (j, i)
                problems.append(
                    f"rank {without[0]} has no rdma device for rank {without[1]}, "
                    f"but rank {without[1]} has one for rank {without[0]}."
                )
            elif there is None and wanted and _must_connect(hosts.backend, i, j, count):
                problems.append(f"ranks {i} and {j} have no rdma devices for each other.")
    return problems


def _must_connect(backend: str, i: int, j: int, count: int) -> bool:
    return backend == "jaccl" or (j - i) in (1, count - 1)


def _parse(content: Any, problems: list[str]) -> HostList | None:
    body = content if isinstance(content, dict) else {"hosts": content}
    rows = body.get("hosts")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        problems.append('it must be a list of {"ssh", "ips", "rdma"}, or have one under "hosts".')
        return None
    hosts = []
    for rank, row in enumerate(rows):
        if not isinstance(row.get("ssh"), str) or row["ssh"].startswith("-"):
            problems.append(f'rank {rank}: "ssh" is {row.get("ssh")!r}; it must be a host name.')
        ips, rdma = (_list(row, name, f"rank {rank}: ", problems) for name in ("ips", "rdma"))
        devices = tuple(device or None for device in rdma)
        hosts.append(Host(str(row.get("ssh")), tuple(map(str, ips)), devices))
    variables = []
    for entry in _list(body, "envs", "", problems):
        name, equals, value = str(entry).partition("=")
        if not equals or not name.isidentifier():
            problems.append(f"envs has {entry!r}; each must be NAME=VALUE.")
        variables.append((name, value))
    return HostList(tuple(hosts), str(body.get("backend") or ""), tuple(variables))


def _list(row: dict[str, Any], name: str, place: str, problems: list[str]) -> list[Any]:
    value = row.get(name) or []
    if isinstance(value, list):
        return value
    problems.append(f'{place}"{name}" is {value!r}; it must be a list.')
    return []


def _is_ipv4(text: str) -> bool:
    try:
        ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return True
