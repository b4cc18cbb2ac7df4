"""Hostfiles, the doctor's judgement and the environment of a backend, without processes."""

import ipaddress
import json
from pathlib import Path
from typing import Any

import pytest
from mlx._distributed_utils.common import Hostfile

import comm
from comm import backend
from comm.__main__ import main as command_line
from comm.capabilities import missing_variables
from comm.environment import ring_hosts
from comm.launcher import cuda, job
from comm.launcher.hostfile import Host, HostList, read_hostfile
from comm.launcher.job import Job, make_hosts, make_orders
from comm.probe import mac_addresses, mac_ports, probe, rdma_devices
from comm.tools.doctor import judge

HOSTFILES = Path(__file__).parents[2] / "recipes" / "hostfiles"


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    """Catches a hostfile that must be corrected one mistake at a time."""
    hosts = [
        {"ssh": "a", "ips": ["fe80::1"], "rdma": ["x", "rdma_en2", "rdma_en3"]},
        {"ssh": "b", "ips": [], "rdma": [None, None, None]},
        {"ssh": "a", "ips": ["10.0.0.3"], "rdma": ["rdma_en2", None, None]},
    ]
    path = tmp_path / "hosts.json"
    path.write_text(json.dumps({"backend": "jaccl", "hosts": hosts}))
    with pytest.raises(ValueError) as error:
        read_hostfile(str(path))
    text = str(error.value)
    for words in (
        "a is named 2 times",
        "'fe80::1' is no IPv4 address",
        "rank 0's rdma entry for itself is 'x'",
        "rank 1 has no rdma device for rank 0",
        "ranks 1 and 2 have no rdma devices for each other",
    ):
        assert words in text, f"{words!r} is missing in:\n{text}"
    assert len(text.splitlines()) == 5, text


def test_both_forms_of_a_hostfile(tmp_path: Path) -> None:
    """Catches one of MLX's two hostfile forms being refused."""
    rows = [{"ssh": "a", "ips": ["10.0.0.1"]}, {"ssh": "b", "ips": ["10.0.0.2"]}]
    plain, full = tmp_path / "plain.json", tmp_path / "full.json"
    plain.write_text(json.dumps(rows))
    full.write_text(json.dumps({"backend": "ring", "envs": ["A=1=2"], "hosts": rows}))
    assert read_hostfile(str(plain)).hosts == read_hostfile(str(full)).hosts
    assert read_hostfile(str(full)).variables == (("A", "1=2"),)


@pytest.mark.filterwarnings("ignore:.*FileIO:ResourceWarning")  # MLX's reader leaves the file open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("name", "backend", "count"), [("ring-2", "ring", 2), ("ring-4", "ring", 4), ("jaccl-4", "jaccl", 4)]
)
def test_hostfiles_that_come_along(name: str, backend: str, count: int) -> None:
    """Catches an example that our launcher or MLX's would refuse, or that nobody lists here; and a last rank that
    starts with the others, calls rank 0 too early and waits a second.
    """
    assert {path.stem for path in HOSTFILES.iterdir()} == {"ring-2", "ring-4", "jaccl-4"}
    path = HOSTFILES / f"{name}.json"
    hosts = read_hostfile(str(path))
    assert (hosts.backend, len(hosts.hosts)) == (backend, count)
    theirs = Hostfile.from_file(str(path))
    assert [host.ssh_hostname for host in theirs.hosts] == [host.ssh for host in hosts.hosts]
    assert all(host.ips and ipaddress.ip_address(host.ips[0]).is_private for host in hosts.hosts)
    greetings = [{"ring": [f"{host.ips[0]}:1"], "control": "127.0.0.1:1", "extra": ["127.0.0.1:2"]} for host in hosts.hosts]
    orders = make_orders(Job(("true",), hosts, hosts.backend), greetings, "secret", attempt=2)
    assert all(order["variables"]["COMM_RESTARTS"] == "2" for order in orders)
    assert ("MLX_IBV_DEVICES" in orders[0]["files"]) == (backend == "jaccl")
    assert [order["delay_seconds"] > 0 for order in orders] == [False] * (count - 1) + [True]


@pytest.mark.parametrize(("gap", "is_told"), [(False, True), (True, False)])
def test_a_ring_world_hears_of_all_rdma_devices(gap: bool, is_told: bool) -> None:
    """Catches `parallel.backend: {tp: jaccl, default: ring}` that can never be had, or had with a cable missing."""
    rdma = [[None if i == j or (gap and {i, j} == {0, 2}) else f"rdma_en{j}" for j in range(3)] for i in range(3)]
    hosts = HostList(tuple(Host(f"mac-{i}", (f"10.0.0.{i}",), tuple(row)) for i, row in enumerate(rdma)), "ring")
    greetings = [{"ring": ["10.0.0.1:1"], "control": "10.0.0.1", "extra": ["10.0.0.1:2"]}] * 3
    orders = make_orders(Job(("true",), hosts, "ring"), greetings, "secret")
    for order in orders:
        assert ("MLX_IBV_DEVICES" in order["files"]) == ("MLX_JACCL_COORDINATOR" in order["variables"]) == is_told
        assert order["variables"]["COMM_BACKEND"] == "ring"
        assert "MLX_JACCL_RING" not in order["variables"]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        '{"hosts": 3}',
        "[]",
        '[{"ips": []}]',
        '[{"ssh": "a", "ips": "10.0.0.1"}]',
        '[{"ssh": "a", "rdma": 5}]',
        '{"hosts": [{"ssh": "a"}], "envs": 5}',
        '{"hosts": [{"ssh": "a"}], "envs": ["A"]}',
        '{"hosts": [{"ssh": "a"}], "envs": ["A=\\u0000"]}',
        '{"hosts": [{"ssh": "a"}], "envs": ["A=\\ud800"]}',
        '[{"ssh": ""}]',
        '[{"ssh": "-oProxyCommand=true"}]',
        '[{"ssh": "a b"}]',
        '[{"ssh": "a\\u0000"}]',
        '[{"ssh": "a\\ud800"}]',
        '[{"ssh": "a", "ips": ["10.0.0.1", "10.0.1.1"]}, {"ssh": "b", "ips": ["10.0.0.2"]}]',
        '[{"ssh": "a", "rdma": [null, 5]}, {"ssh": "b", "rdma": ["x", null]}]',
        '[{"ssh": "a", "rdma": [null, ["x", {}]]}, {"ssh": "b", "rdma": ["x", null]}]',
        '[{"ssh": "a", "rdma": [null, ["x", "y"]]}, {"ssh": "b", "rdma": ["x", null]}]',
        "[" * 100_000,
    ],
    ids=lambda content: content[:60],
)
def test_a_file_that_is_no_hostfile(tmp_path: Path, content: str) -> None:
    """Catches a stack trace where the user needs a sentence."""
    path = tmp_path / "hosts.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="hosts.json") as error:
        read_hostfile(str(path))
    assert len(str(error.value).splitlines()) == 1, "one mistake, several complaints"


def mac(**changes: Any) -> dict[str, Any]:
    return {
        "host": "mac", "system": "Darwin", "python": "3.12.1", "executable": "/venv/bin/python",
        "packages": {"mlx": "0.32.4", "mlx-lm": "0.32.2", "mlx-trainer": "0.1.0"},
        "interfaces": {
            "en0": {"ips": ["192.168.1.5"], "kind": "Wi-Fi"},
            "en1": {"ips": ["192.168.2.5"], "kind": "Ethernet"},
            "en3": {"ips": ["10.0.0.1"], "kind": "Thunderbolt 2"},
        },
        "rdma": {"rdma_en3": "PORT_ACTIVE", "rdma_en4": "PORT_DOWN"},
        "bridge": False, "fast_synch": False, "unusable_ips": [],
        **changes,
    }  # fmt: skip


def judged(host: Host, report: dict[str, Any] | str, level: str) -> str:
    findings = judge(HostList((host,)), {host.ssh: report})
    return "\n".join(finding.text for finding in findings if finding.level == level)


def test_the_doctor_names_what_is_wrong() -> None:
    """Catches a check that does not fire, or that fires on a healthy host."""
    good = Host("a", ("10.0.0.1",), (None, "rdma_en3"))
    assert judged(good, mac(), "fail") == judged(good, mac(), "warn") == ""
    assert "Wi-Fi" in judged(Host("a", ("192.168.1.5",)), mac(), "warn")
    assert "though it has Thunderbolt" in judged(Host("a", ("192.168.2.5",)), mac(), "warn")
    elsewhere = Host("a", ("10.1.1.1",))
    assert "no address 10.1.1.1" in judged(elsewhere, mac(unusable_ips=["10.1.1.1"]), "fail")
    assert "10.1.1.1 on an unlisted interface" in judged(elsewhere, mac(), "pass")
    assert "no RDMA device rdma_en9" in judged(Host("a", (), (None, "rdma_en9")), mac(), "fail")
    assert "PORT_DOWN" in judged(Host("a", (), (None, "rdma_en4")), mac(), "fail")
    bare = mac()["interfaces"] | {"en3": {"ips": [], "kind": "Thunderbolt 2"}}
    assert "en3 has no IPv4 address" in judged(good, mac(interfaces=bare), "fail")
    assert "bridge is on" in judged(good, mac(bridge=True), "fail")
    assert "bridge is on" in judged(Host("a"), mac(bridge=True), "warn")
    assert "FAST_SYNCH" in judged(good, mac(fast_synch=True), "warn")
    assert "cannot open a port" in judged(good, mac(unusable_ips=["10.0.0.1"]), "fail")
    assert "does not answer" in judged(good, "Connection refused", "fail")


def test_the_doctor_compares_versions() -> None:
    """Catches hosts with different MLX or Python, whose results differ or hang."""
    hosts = HostList((Host("a"), Host("b")))
    findings = judge(hosts, {"a": mac(), "b": mac(python="3.11.0")})
    failed = [finding.text for finding in findings if finding.level == "fail"]
    assert failed == [
        "python differs: a has 3.12.1, b has 3.11.0. Install the same version everywhere."
    ]


def test_output_of_mac_tools_is_read() -> None:
    """Catches a parser that finds nothing, so that every check would pass."""
    ports = "\nHardware Port: Wi-Fi\nDevice: en0\nEthernet Address: x\n\nHardware Port: Thunderbolt 1\nDevice: en2\n"
    assert mac_ports(ports) == {"en0": "Wi-Fi", "en2": "Thunderbolt 1"}
    text = "en0: flags=8863<UP>\n\tinet6 fe80::1\n\tinet 10.0.0.7 netmask 0xff\nen2: flags=1\n"
    assert mac_addresses(text) == {"en0": ["10.0.0.7"]}
    info = "hca_id:\trdma_en2\n\tport:\t1\n\t\tstate:\t\tPORT_ACTIVE (4)\nhca_id:\trdma_en3\n\t\tstate: PORT_DOWN (1)\n"
    assert rdma_devices(info) == {"rdma_en2": "PORT_ACTIVE", "rdma_en3": "PORT_DOWN"}


def test_probing_this_machine() -> None:
    """Catches a probe that fails on the system it runs on."""
    found = probe({"MLX_METAL_FAST_SYNCH": "1"}, ["127.0.0.1", "203.0.113.7"])
    assert found["fast_synch"] and found["unusable_ips"] == ["203.0.113.7"]
    assert found["packages"]["mlx"], found


def test_missing_variables_are_named() -> None:
    """Catches an error that does not say what to set."""
    assert missing_variables("ring", {"MLX_RANK": "0"}) == ["MLX_HOSTFILE"]
    assert missing_variables("jaccl", {"MLX_RANK": "0"})[0] == "JACCL_IBV_DEVICES or MLX_IBV_DEVICES"
    with pytest.raises(ValueError, match="MLX_WORLD_SIZE, NCCL_HOST_IP, NCCL_PORT"):
        comm.init("nccl")
    with pytest.raises(ValueError, match="allowed are any, ring"):
        comm.init("tcp")


@pytest.mark.parametrize(
    ("content", "rank", "words"),
    [("[[", "0", "is not JSON"), ('["a"]', "0", "list of lists"), ('[["a:1"]]', "3", "names 1 ranks")],
)
def test_a_damaged_ring_hostfile(tmp_path: Path, content: str, rank: str, words: str) -> None:
    """Catches MLX's own unclear error, or a rank that waits for ever."""
    path = tmp_path / "hosts"
    path.write_text(content)
    with pytest.raises(ValueError, match=words):
        ring_hosts({"MLX_HOSTFILE": str(path), "MLX_RANK": rank})


def test_a_cable_that_is_missing_from_the_start_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches MLX's "Couldn't connect", in which neither the ranks nor the address are."""

    def init(**_: Any) -> None:
        raise RuntimeError("[ring] Couldn't connect (error: 101)")

    (tmp_path / "hosts.json").write_text(json.dumps([["10.0.0.1:1"], ["10.0.0.2:2"], ["10.0.0.3:3", "10.0.1.3:4"]]))
    monkeypatch.setattr(backend.mx.distributed, "init", init)
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts.json"))
    monkeypatch.setenv("MLX_RANK", "1")
    monkeypatch.setenv("COMM_TIMEOUT", "0")
    with pytest.raises(ConnectionError, match="rank 1 does not reach rank 2 at 10.0.0.3:3 or 10.0.1.3:4: .*error: 101"):
        comm.init("ring")


def test_an_empty_ring_hostfile_means_one_rank(tmp_path: Path) -> None:
    """Catches `mlx.launch -n 1`, whose empty file MLX itself refuses."""
    path = tmp_path / "hosts"
    path.write_text("")
    assert ring_hosts({"MLX_HOSTFILE": str(path), "MLX_RANK": "0"}) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["launch", "-n", "2", "python", "x.py"], "the program goes after --"),
        (["launch", "-n", "two", "--", "true"], "two is not a whole number >= 1"),
        (["launch", "--max-restarts", "-1", "--", "true"], "-1 is not a whole number >= 0"),
        (["launch", "--hostfile", "none.json", "--", "true"], "none.json cannot be read: No such file"),
        (["lanch"], "invalid choice: 'lanch'"),
        (["bench", "--plot", "/no/such/folder/x.png"], "--plot"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(words: list[str], message: str, capsys: Any) -> None:
    """Catches a stack trace, or exit code 1, for what the user wrote."""
    with pytest.raises(SystemExit) as caught:
        command_line(words)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


@pytest.mark.parametrize("verb", ["launch", "bench", "doctor"])
def test_every_verb_has_help_with_an_example(verb: str, capsys: Any) -> None:
    """Catches a verb whose use a newcomer has to guess."""
    with pytest.raises(SystemExit) as caught:
        command_line([verb, "--help"])
    assert caught.value.code == 0 and f"python -m comm {verb}" in capsys.readouterr().out.partition("example: ")[2]


def test_ranks_on_a_host_with_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches local ranks that all compute on the first GPU, over TCP."""
    (tmp_path / "0000:01:00.0").mkdir()
    (tmp_path / "0000:02:00.0").mkdir()
    assert cuda.visible_gpus({}, str(tmp_path)) == [], "MLX's CUDA build is not installed here"
    monkeypatch.setattr(cuda, "_is_installed", lambda name: name == "mlx-cuda-13")
    assert cuda.visible_gpus({}, str(tmp_path)) == ["0", "1"] and cuda.visible_gpus({}, str(tmp_path / "none")) == []
    assert cuda.visible_gpus({"CUDA_VISIBLE_DEVICES": "3,5"}, str(tmp_path)) == ["3", "5"]
    monkeypatch.setattr(job, "visible_gpus", lambda environ: ["3", "5"])
    backends = {n: make_hosts(n, None, None, None).backend for n in (1, 2, 3)}
    assert backends == {1: "ring", 2: "nccl", 3: "ring"}
    assert make_hosts(2, None, None, "ring").backend == make_hosts(1, "a,b", None, None).backend == "ring"
    greetings = [{"ring": ["127.0.0.1:1"], "control": "127.0.0.1", "extra": ["127.0.0.1:2"]}] * 3
    for carrier, devices in (("nccl", ["3", "5", "3"]), ("ring", ["3", "5", "3"])):
        orders = make_orders(Job(("true",), make_hosts(3, None, None, carrier), carrier), greetings, "secret")
        assert [order["variables"]["CUDA_VISIBLE_DEVICES"] for order in orders] == devices


def test_a_host_may_be_named_twice(tmp_path: Path) -> None:
    """Catches a host with two GPUs that can have one rank only."""
    path = tmp_path / "hosts.json"
    path.write_text(json.dumps({"backend": "nccl", "hosts": [{"ssh": "a", "ips": ["10.0.0.1"]}] * 2 + [{"ssh": "b", "ips": ["10.0.0.2"]}]}))
    hosts = read_hostfile(str(path))
    greetings = [{"ring": ["10.0.0.1:1"], "control": "10.0.0.1", "extra": ["10.0.0.1:2"]}] * 3
    orders = make_orders(Job(("true",), hosts, "nccl"), greetings, "secret")
    assert [order["variables"]["CUDA_VISIBLE_DEVICES"] for order in orders] == ["0", "1", "0"]
