"""`python -m comm.probe`: what `comm doctor` needs to know of one host, as one line of JSON.

Runs on every host, over ssh too. Reads versions, network interfaces, RDMA devices and whether
ports are free; changes nothing and imports no MLX.
"""

import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from comm.addresses import reserve_ports

GREETING = "comm-probe "
PACKAGES = ("mlx", "mlx-lm", "mlx-trainer")


def probe(environ: Mapping[str, str], ips: list[str]) -> dict[str, Any]:
    """The facts of this host.

    Args:
        environ: The environment that programs on it get.
        ips: Addresses that the hostfile gives it, to try a port on each.
    """
    return {
        "host": socket.gethostname(),
        "system": platform.system(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "packages": {name: _version(name) for name in PACKAGES},
        "interfaces": interfaces(),
        "rdma": rdma_devices(_run("ibv_devinfo")),
        "bridge": "status: active" in _run("ifconfig", "bridge0"),
        "fast_synch": environ.get("MLX_METAL_FAST_SYNCH", "0") not in ("", "0"),
        "unusable_ips": [ip for ip in ips if not _can_listen(ip)],
    }


def interfaces() -> dict[str, dict[str, Any]]:
    """{name: {"ips": IPv4 addresses, "kind": "Wi-Fi", "Thunderbolt 1", "Ethernet", ...}}."""
    if platform.system() == "Darwin":
        kinds = mac_ports(_run("networksetup", "-listallhardwareports"))
        return {
            name: {"ips": ips, "kind": kinds.get(name, "")}
            for name, ips in mac_addresses(_run("ifconfig")).items()
        }
    rows = json.loads(_run("ip", "-j", "-4", "addr") or "[]")
    return {
        row["ifname"]: {
            "ips": [address["local"] for address in row.get("addr_info", [])],
            "kind": "Wi-Fi" if Path("/sys/class/net", row["ifname"], "wireless").exists() else "",
        }
        for row in rows
    }


def mac_ports(text: str) -> dict[str, str]:
    """Device name to hardware port, from `networksetup -listallhardwareports`."""
    return {device: port for port, device in re.findall(r"Hardware Port: (.*)\nDevice: (\S+)", text)}


def mac_addresses(text: str) -> dict[str, list[str]]:
    """Interface to its IPv4 addresses, from `ifconfig`."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if match := re.match(r"(\w+): flags", line):
            name = match[1]
        elif match := re.match(r"\s+inet (\d+(?:\.\d+){3})", line):
            found.setdefault(name, []).append(match[1])
    return found


def rdma_devices(text: str) -> dict[str, str]:
    """Device to port state ("PORT_ACTIVE", "PORT_DOWN"), from `ibv_devinfo`."""
    found = {}
    for block in re.split(r"(?m)^hca_id:", text)[1:]:
        state = re.search(r"state:\s+(\w+)", block)
        found[block.split()[0]] = state[1] if state else "unknown"
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _can_listen(ip: str) -> bool:
    try:
        with reserve_ports([[ip]]):
            return True
    except OSError:
        return False


def _run(*command: str) -> str:
    """Output of a system tool; empty where the tool is missing or fails."""
    if not shutil.which(command[0]):
        return ""
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return done.stdout if done.returncode == 0 else ""


if __name__ == "__main__":
    print(GREETING + json.dumps(probe(os.environ, sys.argv[1:])), flush=True)
