"""Ranks that die, stop, leave, fail or come late: the job ends on every rank, and says why."""

import os
import selectors
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from comm.control_port import NUM_STRANGERS, ControlPort
from comm.heartbeat import Channel, Malformed
from comm.watchdog import phase_timeout_seconds, timeout_seconds
from ranks import RankResult, run_ranks

WORKER = Path(__file__).parent / "workers" / "failing.py"
TIMEOUT_SECONDS = 3
CASES = {  # what happens, to which rank, on what, and the words that every survivor must print
    "killed": ("kill", 1, "ring", "rank 1 ({host}) died"),
    "stopped": ("stop", 1, "ring", "rank 1 ({host})"),
    "left early": ("exit", 1, "ring", "rank 1 ({host}) ended early"),
    "failed": ("raise", 1, "ring", "rank 1 ({host}) died"),
    "late": ("late", 1, "ring", "waited {timeout} s for rank 1 ({host})"),
    "still in a phase": ("still", 1, "ring", "'tokenising' has not moved for"),
    "still while it loads": ("still loading", 1, "ring", "'loading' has not moved for"),
    "cable cut": ("cable", 1, "ring", "rank 1 ({host}) gets no answer from rank 2 ({host}) at"),
    "rank 0 killed": ("kill", 0, "ring", "rank 0 ({host}) died"),
    "rank 0 stopped": ("stop", 0, "ring", "rank 0 ({host}) has not answered"),
    "rank 0 left early": ("exit", 0, "ring", "rank 0 ({host})"),
    "killed on a backend that hangs": ("kill", 1, "fake", "rank 1 ({host}) died"),
    "left early on MPI": ("exit", 1, "mpi", "rank 1 ({host})"),
    "left early on a backend that hangs": ("exit", 1, "fake", "rank 1 ({host}) ended early"),
}


SURVIVED = {
    "phase": ("1", {"COMM_TIMEOUT": "4"}),
    "garbage": ("9", {}),
    "reports": ("1", {"COMM_PHASE_TIMEOUT": "3", "COMM_TIMEOUT": "3"}),
    "downloads": ("1", {"COMM_PHASE_TIMEOUT": "3", "COMM_TIMEOUT": "3"}),
    "goodbye": ("1", {}),
    "crowd": ("9", {"COMM_TIMEOUT": "3"}),
    "end": ("1", {"COMM_TIMEOUT": "3"}),
    "stop last": ("1", {"COMM_TIMEOUT": "3"}),
}


def run(name: str) -> list[RankResult]:
    if name in SURVIVED:
        victim, env = SURVIVED[name]
        backend = "mpi" if name in ("end", "stop last") else "ring"
        return run_ranks(WORKER, 2, backend=backend, args=(name, victim), timeout=60, env=env, check=False)
    kind, victim, carrier, _ = CASES[name]
    return run_ranks(
        WORKER, 3 if name in ("killed", "late", "cable cut") else 2,
        backend="mpi" if carrier == "mpi" else "ring",
        args=(kind, str(victim), carrier), timeout=60, check=False,
        left_behind=(victim,) if kind == "stop" else (),
        env={"COMM_TIMEOUT": str(TIMEOUT_SECONDS), "COMM_PHASE_TIMEOUT": "4"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[RankResult]]:
    names = (*SURVIVED, *CASES)
    with ThreadPoolExecutor(max_workers=5) as pool:
        return dict(zip(names, pool.map(run, names), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_the_job_ends_and_names_the_rank(
    outcomes: dict[str, list[RankResult]], name: str
) -> None:
    """Catches a job that hangs, ends with success, or does not say whom it waited for."""
    kind, victim, _, words = CASES[name]
    words = words.format(host=socket.gethostname(), timeout=TIMEOUT_SECONDS)
    for rank, one in enumerate(outcomes[name]):
        assert "joined" in one.stdout, f"rank {rank}: {one.stderr}"
        assert "finished" not in one.stdout, f"rank {rank} went on"
        if rank != victim or kind in ("late", "still", "still loading", "cable"):
            assert one.returncode == 1, f"rank {rank}: exit {one.returncode}\n{one.stderr}"
            assert words in one.stderr, f"rank {rank} does not say {words!r}:\n{one.stderr}"
            assert "all_sum (100000,) float32" in one.stderr, f"last operation: {one.stderr}"
    if kind == "raise":
        assert "the victim's own error" in outcomes[name][victim].stderr


def test_a_rank_that_fails_on_mpi_ends_all() -> None:
    """Catches MPI's clean-up waiting for ever after an exception on one rank."""
    ranks = run_ranks(WORKER, 3, backend="mpi", args=("raise", "1"), timeout=40, check=False)
    assert all(one.returncode == 1 for one in ranks)
    assert "the victim's own error" in ranks[1].stderr


def test_a_declared_phase_may_last(outcomes: dict[str, list[RankResult]]) -> None:
    """Catches a job ended because one rank downloads or tokenises for long."""
    for one in (*outcomes["phase"], *outcomes["reports"], *outcomes["downloads"]):
        assert one.returncode == 0 and "finished" in one.stdout, one.stderr


def test_a_rank_may_leave_before_the_others(outcomes: dict[str, list[RankResult]]) -> None:
    """Catches rank 0 being ended while it saves, because the others have already left."""
    leaver, other = outcomes["goodbye"][1], outcomes["goodbye"][0]
    assert leaver.returncode == other.returncode == 0, other.stderr
    assert "finished" in other.stdout and "died" not in other.stderr, other.stderr


def test_a_rank_may_work_on_while_the_others_wait_in_mpi_s_end(outcomes: dict[str, list[RankResult]]) -> None:
    """Catches ranks that have left but keep their connections, as MPI waits for all, being taken for silent ones."""
    last = outcomes["end"][0]
    assert last.returncode == 0 and "finished" in last.stdout, last.stderr


def test_a_rank_that_stops_in_mpi_s_end_is_named(outcomes: dict[str, list[RankResult]]) -> None:
    """Catches a job that waits for ever in the end of MPI, whose ranks have all said goodbye but one."""
    first = outcomes["stop last"][0]
    assert first.returncode == 1 and "finished" in first.stdout, first.stderr
    assert f"rank 1 ({socket.gethostname()}) has not answered for 3 s" in first.stderr, first.stderr


def test_garbage_on_the_heartbeat_port_is_dropped_and_logged(
    outcomes: dict[str, list[RankResult]],
) -> None:
    """Catches a stranger that can end or crash a job through its open port."""
    for one in outcomes["garbage"]:
        assert one.returncode == 0 and "finished" in one.stdout, one.stderr
    assert outcomes["garbage"][0].stderr.count("dropped a message") >= 3


def test_a_crowd_on_the_heartbeat_port_ends_nothing(
    outcomes: dict[str, list[RankResult]],
) -> None:
    """Catches a watchdog that dies of the last file descriptor, and the job with it."""
    for one in outcomes["crowd"]:
        assert one.returncode == 0 and "finished" in one.stdout, one.stderr


@pytest.mark.parametrize("num_idle", [3, 100])
def test_the_control_port_keeps_a_known_rank_and_few_strangers(num_idle: int) -> None:
    """Catches idle connections piling up, and a rank being dropped instead of one of them."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = ControlPort(listener, "secret", selectors.DefaultSelector(), 2)
        idle = []
        for _ in range(num_idle):
            idle.append(socket.create_connection(listener.getsockname()))
            port.accept()
            port.peers[0].rank = 1
        assert len(port.peers) == min(num_idle, 1 + NUM_STRANGERS + 2)
        assert port.peers[0].rank == 1
        port.drop_silent_strangers(time.monotonic() + 60)
        assert [peer.rank for peer in port.peers] == [1]
        for sock in (*idle, *(peer.channel.sock for peer in port.peers)):
            sock.close()


Ends = tuple[Channel, Channel]


@pytest.fixture
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    """A rank-0 end with the job's secret, and another with the parameter's (or the same)."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        member = Channel(
            socket.create_connection(server.getsockname()),
            getattr(request, "param", "secret"),
            listener=False,
        )
        hub = Channel(server.accept()[0], "secret", listener=True)
        arrive(member)
        yield hub, member
        member.close()
        hub.close()


def arrive(end: Channel, num_messages: int = 0) -> list:
    """Reads until the nonce and that many messages have come."""
    messages = end.receive()
    while len(messages) < num_messages or not end._nonce:
        time.sleep(0.01)
        messages += end.receive()
    return messages


def test_messages_pass_in_both_directions(ends: Ends) -> None:
    """Catches a framing or signature that the other end does not accept."""
    hub, member = ends
    for i in range(3):
        member.send({"i": i})
        hub.send([i])
    assert arrive(hub, 3) == [{"i": 0}, {"i": 1}, {"i": 2}]
    assert arrive(member, 3) == [[0], [1], [2]]
    member.close()
    time.sleep(0.05)
    assert hub.receive() == [] and not hub.open


@pytest.mark.parametrize("ends", ["other"], indirect=True)
def test_another_jobs_secret_is_refused(ends: Ends) -> None:
    """Catches messages of another job being believed."""
    hub, member = ends
    member.send({"rank": 1})
    with pytest.raises(Malformed, match="signature"):
        arrive(hub, 1)


def test_a_replayed_message_is_refused(ends: Ends) -> None:
    """Catches an eavesdropper who sends an old message again."""
    hub, member = ends
    member.send({"rank": 1})
    time.sleep(0.05)
    data = hub.sock.recv(4096, socket.MSG_PEEK)
    assert arrive(hub, 1) == [{"rank": 1}]
    member.sock.sendall(data)
    with pytest.raises(Malformed, match="signature"):
        arrive(hub, 1)


def test_the_timeout_is_checked() -> None:
    """Catches a mistyped COMM_TIMEOUT that would switch the watchdog off."""
    assert phase_timeout_seconds({}) == 600
    with pytest.raises(ValueError, match="COMM_PHASE_TIMEOUT is 'soon'"):
        phase_timeout_seconds({"COMM_PHASE_TIMEOUT": "soon"})
    assert timeout_seconds({}) == 300 and timeout_seconds({"COMM_TIMEOUT": "0"}) == 0
    for text in ("-1", "soon", "inf", "nan"):
        with pytest.raises(ValueError, match="COMM_TIMEOUT"):
            timeout_seconds({"COMM_TIMEOUT": text})
    assert os.environ.get("COMM_TIMEOUT") is None
