"""`python -m comm doctor`: is this machine, or every host of a hostfile, ready for a job?

Each line says pass, warn or fail, and what to do. The judging is a pure function of what
`comm.probe` reports. Exit code 1 when something fails.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from comm.launcher.hostfile import Host, HostList, read_hostfile
from comm.launcher.job import remote_line, ssh_words
from comm.launcher.launch import agent_environment
from comm.probe import GREETING

SSH_SECONDS = 30


@dataclass(frozen=True)
class Finding:
    """One line of the doctor: how bad, about what, and what to do."""

    level: Literal["pass", "warn", "fail"]
    text: str


def main(options: argparse.Namespace) -> int:
    """Probes the hosts and prints the findings; returns 1 if any failed, 2 if the hostfile is wrong."""
    try:
        hosts = read_hostfile(options.hostfile) if options.hostfile else None
    except ValueError as error:
        print("\n".join(f"fail  {line}" for line in str(error).splitlines()))
        return 2
    hosts = hosts or HostList((Host("127.0.0.1"),))
    reports = {host.ssh: ask(host, hosts, options) for host in hosts.hosts}
    findings = judge(hosts, reports)
    for finding in findings:
        print(f"{finding.level:<5} {finding.text}")
    return int(any(finding.level == "fail" for finding in findings))


def ask(host: Host, hosts: HostList, options: argparse.Namespace) -> dict[str, Any] | str:
    """The report of one host, or why there is none; the way there and the interpreter are those of a job."""
    command = ["-m", "comm.probe", *host.ips]
    if host.is_local:
        command = [sys.executable, *command]
    else:
        variables = [f"{name}={value}" for name, value in hosts.variables]
        line = remote_line(options.cwd, ["env", *variables, options.python, *command])
        command = [*ssh_words(options.ssh, SSH_SECONDS), host.ssh, line]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SSH_SECONDS,
            env={**agent_environment(), **dict(hosts.variables)}, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    for line in done.stdout.splitlines():
        if line.startswith(GREETING):
            return json.loads(line.removeprefix(GREETING))
    return done.stderr.strip() or f"exit code {done.returncode}"


def judge(hosts: HostList, reports: Mapping[str, dict[str, Any] | str]) -> list[Finding]:
    """All findings about these hosts."""
    findings = []
    known: dict[str, dict[str, Any]] = {}
    for name, report in reports.items():
        if isinstance(report, str):
            findings.append(
                Finding("fail", f"{name} does not answer: {report}. Try `ssh {name} true`.")
            )
        else:
            findings.append(Finding("pass", f"{name} answers, with {report['executable']}"))
            known[name] = report
    findings += _versions(known)
    for host in hosts.hosts:
        if host.ssh in known:
            findings += _network(host, known[host.ssh])
            findings += _rdma(host, known[host.ssh])
    for name, report in known.items():
        findings += _settings(name, report, any(host.rdma for host in hosts.hosts))
    return findings


def _versions(known: Mapping[str, dict[str, Any]]) -> list[Finding]:
    findings = []
    for what in ("python", "mlx", "mlx-lm", "mlx-trainer"):
        found = {
            name: report["python"] if what == "python" else report["packages"].get(what)
            for name, report in known.items()
        }
        listed = ", ".join(f"{name} has {version or 'none'}" for name, version in found.items())
        if len(set(found.values())) > 1:
            findings.append(
                Finding("fail", f"{what} differs: {listed}. Install the same version everywhere.")
            )
        elif what == "mlx" and None in found.values():
            findings.append(Finding("fail", f"{listed}: pip install -e '.[cpu]', or mlx on a Mac."))
        elif found:
            findings.append(Finding("pass", f"{what} {next(iter(found.values())) or 'not installed'}"))
    return findings


def _network(host: Host, report: Mapping[str, Any]) -> list[Finding]:
    findings = []
    interfaces = report["interfaces"]
    has_thunderbolt = any(_is_cable(one["kind"]) for one in interfaces.values())
    for ip in host.ips:
        owner = next((name for name, one in interfaces.items() if ip in one["ips"]), None)
        if owner is None and ip in report["unusable_ips"]:
            text = f"{host.ssh} has no address {ip}. Correct the hostfile or set the address."
            findings.append(Finding("fail", text))
            continue
        # A host that opens ports on it has the address, whatever its tools list.
        kind = interfaces[owner]["kind"] if owner else ""
        if ip in report["unusable_ips"]:
            text = f"{host.ssh} cannot open a port on {ip}. Check its firewall."
            findings.append(Finding("fail", text))
        elif kind == "Wi-Fi":
            text = f"{host.ssh}: {ip} is on Wi-Fi ({owner}). Use a cable's address for the ring."
            findings.append(Finding("warn", text))
        elif has_thunderbolt and owner and not _is_cable(kind):
            text = (
                f"{host.ssh}: {ip} is on {kind or 'the LAN'} ({owner}) though it has Thunderbolt. "
                "Use the Thunderbolt addresses for the ring."
            )
            findings.append(Finding("warn", text))
        else:
            findings.append(Finding("pass", f"{host.ssh}: {ip} on {kind or owner or 'an unlisted interface'}, ports are free"))
    return findings


def _is_cable(kind: str) -> bool:
    return kind.startswith("Thunderbolt") and "Bridge" not in kind


def _rdma(host: Host, report: Mapping[str, Any]) -> list[Finding]:
    findings = []
    for device in _devices(host.rdma):
        state = report["rdma"].get(device)
        if state is None:
            text = (
                f"{host.ssh} has no RDMA device {device}. Names change after a restart: run "
                "mlx.distributed_config again; `rdma_ctl enable` in recovery mode turns RDMA on."
            )
            findings.append(Finding("fail", text))
        elif state != "PORT_ACTIVE":
            text = f"{host.ssh}: {device} is {state}. Check the cable and the other host."
            findings.append(Finding("fail", text))
        else:
            findings += _rdma_address(host, device, report["interfaces"])
    return findings


def _rdma_address(host: Host, device: str, interfaces: Mapping[str, Any]) -> list[Finding]:
    """JACCL addresses a device by its interface's IPv4 address, so one without cannot be connected."""
    interface = device.removeprefix("rdma_")
    if interfaces.get(interface, {"ips": ["unlisted"]})["ips"]:
        return [Finding("pass", f"{host.ssh}: {device} is active")]
    text = (
        f"{host.ssh}: {interface} has no IPv4 address, which {device} needs. Run mlx.distributed_config with "
        "--auto-setup again, or set one."
    )
    return [Finding("fail", text)]


def _devices(rdma: Sequence[str | list[str] | None]) -> list[str]:
    names: list[str] = []
    for entry in rdma:
        names += entry if isinstance(entry, list) else [entry] if entry else []
    return list(dict.fromkeys(names))


def _settings(name: str, report: Mapping[str, Any], uses_rdma: bool) -> list[Finding]:
    findings = []
    if report["bridge"]:
        level = "fail" if uses_rdma else "warn"
        text = f"{name}: the Thunderbolt bridge is on. Turn it off: sudo ifconfig bridge0 down."
        findings.append(Finding(level, text))
    elif report["system"] == "Darwin":
        findings.append(Finding("pass", f"{name}: the Thunderbolt bridge is off"))
    if report["fast_synch"]:
        text = f"{name}: MLX_METAL_FAST_SYNCH is set, which can hang a GPU until restart. Unset it."
        findings.append(Finding("warn", text))
    return findings
