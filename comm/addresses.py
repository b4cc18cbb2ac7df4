"""The addresses of this host and free ports on them.

An address comes from the launcher's hostfile where there is one, else from the system. Ports are
held by a bound socket until MLX has bound them too, so no other program can take them meanwhile.
"""

import ipaddress
import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from comm.environment import ring_hosts


def own_addresses(environ: Mapping[str, str]) -> dict[str, Any]:
    """Where other ranks reach this one.

    Returns:
        {"ring": the addresses of its entry in the hostfile, "control": the address that every
        host reaches, "" when not known, "host": the host's name}.
    """
    rank = int(environ.get("MLX_RANK", "0"))
    hosts = ring_hosts(environ) if {"MLX_HOSTFILE", "MLX_RANK"} <= environ.keys() else []
    control = json.loads(environ["COMM_ADDRESSES"])[rank] if "COMM_ADDRESSES" in environ else ""
    ring = [address.rsplit(":", 1)[0] for address in hosts[rank]] if hosts else []
    return {
        "ring": ring or [control or host_address()],
        "control": control,
        "host": socket.gethostname(),
    }


def host_address() -> str:
    """This host's IPv4 address on the network its default route leads to, else 127.0.0.1."""
    return address_towards("192.0.2.1") or "127.0.0.1"  # a documentation address


def address_towards(destination: str) -> str:
    """This host's IPv4 address on the network, or the cable, that leads to `destination`; "" where none does."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((destination, 9))  # nothing is sent
            return probe.getsockname()[0]
        except OSError:
            return ""


def is_reachable_ipv4(address: str) -> bool:
    """Whether other hosts may reach this address, as MLX does: over IPv4, and not a host's own to itself."""
    try:
        return not ipaddress.IPv4Address(address).is_loopback
    except ValueError:
        return False


@contextmanager
def reserve_ports(wanted: Sequence[Sequence[str]]) -> Iterator[list[list[str]]]:
    """Holds one free port per address while the block runs; gives them as "ip:port"."""
    with ExitStack() as held:
        yield [[_reserve(ip, held) for ip in ips] for ips in wanted]


def _reserve(ip: str, held: ExitStack) -> str:
    one = held.enter_context(socket.socket())
    # MLX sets the same options, which lets both bind the port; only MLX listens on it.
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    one.bind((ip, 0))
    return f"{ip}:{one.getsockname()[1]}"
