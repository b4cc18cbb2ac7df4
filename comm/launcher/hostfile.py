"""Hostfiles as MLX writes them, checked as a whole.

Either a list of {"ssh", "ips", "rdma"} or {"backend", "envs", "hosts": that list}. All mistakes
are reported at once. Nothing here imports MLX.
"""

import ipaddress
import json
from collections import Counter
from dataclasses import dataclass, replace
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


def read_hostfile(path: str, backend: str = "") -> HostList:
    """Reads and checks a hostfile.

    Args:
        path: The file.
        backend: Asked for in place of the one that the file names.

    Raises:
        ValueError: Everything that is wrong with it, one line each.
    """
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply to be a hostfile.") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from None
    problems: list[str] = []
    hosts = _parse(content, problems)
    if hosts is not None:
        hosts = replace(hosts, backend=backend or hosts.backend)
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
    if hosts.backend.startswith("jaccl"):  # one rank for a device; elsewhere a host may have several ranks
        counts = Counter(host.ssh for host in hosts.hosts if not host.is_local)
        problems += [f"{name} is named {n} times." for name, n in counts.items() if n > 1]
    for rank, host in enumerate(hosts.hosts):
        if not _is_host_name(host.ssh):
            problems.append(f"rank {rank}: {host.ssh!r} is no host name.")
        problems += [
            f"rank {rank} ({host.ssh}): {ip!r} is no IPv4 address."
            for ip in host.ips
            if not _is_ipv4(ip)
        ]
    problems += [
        f"envs has {name!r}; each must be NAME=VALUE, of characters that a program can be given."
        for name, value in hosts.variables
        if not name.isidentifier() or not _is_text(value)
    ]
    cables = {len(host.ips) or 1 for host in hosts.hosts}
    if hosts.backend in ("", "ring") and len(cables) > 1:
        counted = ", ".join(f"{host.ssh}: {len(host.ips)}" for host in hosts.hosts)
        problems.append(f"every host must have as many ips as the others ({counted}).")
    return problems + check_rdma(hosts)


def check_rdma(hosts: HostList) -> list[str]:
    """What is wrong with the table of RDMA devices, one sentence each."""
    table = [host.rdma for host in hosts.hosts]
    count = len(table)
    wanted = hosts.backend.startswith("jaccl") and count > 1
    if not any(table) and not wanted:
        return []
    short = [rank for rank, row in enumerate(table) if len(row) != count]
    if short:
        return [
            f"rank {rank} ({hosts.hosts[rank].ssh}) has {len(table[rank])} rdma entries; "
            f"it needs {count}, one per rank."
            for rank in short
        ]
    odd = [
        f"rank {rank}'s rdma entry {entry!r} is neither a device, nor a list of devices, nor null."
        for rank, row in enumerate(table)
        for entry in row
        if not _is_entry(entry)
    ]
    if odd:
        return odd
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
            elif _num_devices(there) != _num_devices(back):
                problems.append(
                    f"rank {i} has {_num_devices(there)} rdma devices for rank {j}, "
                    f"which has {_num_devices(back)} for rank {i}; each cable has two ends."
                )
    return problems


def _must_connect(backend: str, i: int, j: int, count: int) -> bool:
    return backend == "jaccl" or (j - i) in (1, count - 1)


def _parse(content: Any, problems: list[str]) -> HostList | None:
    body = content if isinstance(content, dict) else {"hosts": content}
    rows = body.get("hosts")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        problems.append('it must be a list of {"ssh", "ips", "rdma"}, or have one under "hosts".')
        return None
    if not rows:
        problems.append("it names no hosts.")
    hosts = []
    for rank, row in enumerate(rows):
        if not isinstance(row.get("ssh"), str):
            problems.append(f'rank {rank}: "ssh" is {row.get("ssh")!r}; it must be a host name.')
            continue
        ips, rdma = (_list(row, name, f"rank {rank}: ", problems) for name in ("ips", "rdma"))
        hosts.append(Host(row["ssh"], tuple(map(str, ips)), tuple(entry or None for entry in rdma)))
    variables = []
    for entry in _list(body, "envs", "", problems):
        name, equals, value = str(entry).partition("=")
        if equals:
            variables.append((name, value))
        else:
            problems.append(f"envs has {entry!r}; each must be NAME=VALUE.")
    return HostList(tuple(hosts), str(body.get("backend") or ""), tuple(variables))


def _list(row: dict[str, Any], name: str, place: str, problems: list[str]) -> list[Any]:
    value = row.get(name) or []
    if isinstance(value, list):
        return value
    problems.append(f'{place}"{name}" is {value!r}; it must be a list.')
    return []


def names_every_device(hosts: HostList) -> bool:
    """Whether the hosts name RDMA devices between all pairs of ranks, as a JACCL mesh of any of them needs."""
    count = len(hosts.hosts)
    return count > 1 and all(
        len(host.rdma) == count and all(host.rdma[other] for other in range(count) if other != rank)
        for rank, host in enumerate(hosts.hosts)
    )


def _is_host_name(text: str) -> bool:
    """Also of an ssh configuration; a leading dash would be an option of ssh."""
    return bool(text) and text.isprintable() and " " not in text and not text.startswith("-")


def _is_text(text: str) -> bool:
    """Whether a program's environment can hold it."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _is_entry(entry: Any) -> bool:
    devices = entry if isinstance(entry, list) else [entry]
    return entry is None or all(isinstance(device, str) and device for device in devices)


def _num_devices(entry: str | list[str] | None) -> int:
    return len(entry) if isinstance(entry, list) else int(entry is not None)


def _is_ipv4(text: str) -> bool:
    try:
        ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return True
