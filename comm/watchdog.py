"""Ends the job on every rank when one of them died, was stopped, or is missing.

Beside MLX's traffic each rank reports once a second to rank 0, which answers with the table of
all ranks and decides by it (see `judging.py`). The end is `os._exit(1)`, as a rank inside a
collective cannot be reached in any other way.
"""

import atexit
import logging
import math
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from comm.addresses import own_addresses
from comm.cables import AnsweringPorts, silent_addresses
from comm.control_port import ControlPort, Peer, listen, reach
from comm.ending import GRACE_SECONDS, farewells, leave_after
from comm.group import Group
from comm.heartbeat import Channel, Malformed
from comm.judging import Judge, RankStatus, rank_names
from comm.objects import all_gather_object, broadcast_object
from comm.progress import BY_PROCESSOR, Progress

_log = logging.getLogger(__name__)

DEFAULT_TIMEOUT_SECONDS = 300.0
DEFAULT_PHASE_TIMEOUT_SECONDS = 600.0


def start_watchdog(world: Group, environ: Mapping[str, str] = os.environ) -> "Watchdog | None":
    """Starts the watchdog of `world`; every rank must call it.

    `COMM_TIMEOUT` holds the seconds (0: no watchdog), `COMM_PHASE_TIMEOUT` those of a long phase
    (0: any number), `COMM_SECRET` the job's secret; without one rank 0 makes it up and sends it
    over the group.
    """
    timeout = timeout_seconds(environ)
    if world.size == 1 or timeout == 0:
        return None
    own = own_addresses(environ)
    listener, endpoints = listen(own) if world.rank == 0 else (None, [])
    ports = AnsweringPorts(own["ring"])
    rows = all_gather_object([own["host"], endpoints, ports.endpoints], world)
    hub = reach(rows[0][1]) if world.rank else None
    lonely = [rank for rank, ok in enumerate(all_gather_object(world.rank == 0 or hub is not None, world)) if not ok]
    if lonely:
        if world.rank == 0:
            _log.warning("ranks %s reach none of rank 0's addresses: the job runs without a heartbeat", lonely)
        for sock in filter(None, (listener, hub)):
            sock.close()
        return None
    secret = environ.get("COMM_SECRET") or broadcast_object(secrets.token_hex(16), world)
    hosts = [row[0] for row in rows]
    following = [(ip, port) for ip, port in rows[(world.rank + 1) % world.size][2]]
    judge = Judge(timeout, phase_timeout_seconds(environ) or math.inf, _interval_of(timeout))
    watchdog = Watchdog(world.rank, hosts, secret, judge, world.progress, ports, following)
    watchdog.start(listener, hub)
    # MPI's end waits for all ranks, and nobody but the watchdog can end that.
    atexit.register(watchdog.wait_for_all if world.backend == "mpi" else watchdog.close)
    farewells.append(watchdog.close)
    sys.excepthook = leave_after(sys.excepthook, world.progress)
    return watchdog


def timeout_seconds(environ: Mapping[str, str]) -> float:
    """`COMM_TIMEOUT` in seconds, 300 where it is not set."""
    return _seconds(environ, "COMM_TIMEOUT", DEFAULT_TIMEOUT_SECONDS)


def phase_timeout_seconds(environ: Mapping[str, str]) -> float:
    """`COMM_PHASE_TIMEOUT` in seconds, 600 where it is not set."""
    return _seconds(environ, "COMM_PHASE_TIMEOUT", DEFAULT_PHASE_TIMEOUT_SECONDS)


def _seconds(environ: Mapping[str, str], name: str, default: float) -> float:
    text = environ.get(name, "")
    try:
        seconds = float(text or default)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{name} is {text!r}; it must be a number of seconds, 0 for none.")
    return seconds


def _interval_of(timeout: float) -> float:
    """Seconds between two reports."""
    return min(1.0, timeout / 4)


class Watchdog:
    """The heartbeat of one rank, in a thread of its own that never touches MLX.

    Args:
        rank: This rank's number.
        hosts: The host name of each rank.
        secret: The job's secret.
        judge: Decides by the table; its time-out is also how long a rank may be silent.
        progress: What this rank is doing.
        ports: Where the rank before this one tries the cable between them.
        following: The ports of the rank after this one.
    """

    def __init__(
        self,
        rank: int,
        hosts: list[str],
        secret: str,
        judge: Judge,
        progress: Progress,
        ports: AnsweringPorts,
        following: Sequence[tuple[str, int]],
    ):
        self.rank, self.timeout_seconds, self.progress = rank, judge.timeout_seconds, progress
        self.table = [RankStatus(host) for host in hosts]
        self._judge, self._ports, self.following = judge, ports, following
        self._silent_addresses: list[str] = []
        self._has_probed = False
        self._interval = _interval_of(judge.timeout_seconds)
        self._secret = secret
        self._main = threading.main_thread().ident
        self._place: tuple[Any, ...] = ()
        self._moved = self._ticked = self._hub_heard = time.monotonic()
        self._port: ControlPort | None = None
        self._hub: Channel | None = None
        self._hub_died = False
        self._selector = selectors.DefaultSelector()
        self._closing = threading.Event()
        self._has_left = self._waits_for_all = False
        self._thread = threading.Thread(target=self._run, name="comm-watchdog", daemon=True)

    def start(self, listener: socket.socket | None, hub: socket.socket | None) -> None:
        """Rank 0 listens; the others have connected to it."""
        if listener is not None:
            self._port = ControlPort(listener, self._secret, self._selector, len(self.table))
        else:
            assert hub is not None, "a rank has a listener or a connection"
            self._hub = Channel(hub, self._secret, listener=False)
            self._selector.register(hub, selectors.EVENT_READ)
            # Rank 0 must know this connection before anything can happen to this rank.
            self._selector.select(timeout=self.timeout_seconds)
            self._hub.receive()
            self._report(self._hub)
        self._thread.start()

    def close(self) -> None:
        """Says goodbye: this rank ends as it should."""
        self._closing.set()
        self._thread.join(timeout=5)

    def wait_for_all(self) -> None:
        """Says goodbye, and returns once every rank has."""
        self._waits_for_all = True
        self._closing.set()
        self._thread.join()

    @property
    def _peers(self) -> list[Peer]:
        return self._port.peers if self._port else []

    def _run(self) -> None:
        while not self._closing.is_set():
            self._turn()
        self._has_left = True
        self._say_how_it_is()
        while self._waits_for_all and self._knows_of_others_there():
            self._turn()
        if self._waits_for_all:
            self._say_how_it_is()
            for peer in self._peers:
                peer.channel.close()  # for a rank that has missed the last message

    def _turn(self) -> None:
        # Short enough for close() to return quickly; reports go out once per interval.
        self._read(self._selector.select(timeout=min(self._interval, 0.1)))
        if time.monotonic() - self._ticked >= self._interval:
            self._tick()

    def _knows_of_others_there(self) -> bool:
        is_connected = self._port is not None or (self._hub is not None and self._hub.open)
        return is_connected and not all(status.left for status in self.table)

    def _say_how_it_is(self) -> None:
        self.table[self.rank] = self._own_status(time.monotonic())
        table = [asdict(status) for status in self.table]
        for peer in self._peers:
            peer.channel.send({"table": table})
        if self._hub:
            self._report(self._hub)

    def _report(self, hub: Channel) -> None:
        hub.send({"rank": self.rank, "status": asdict(self._own_status(time.monotonic()))})

    def _read(self, events: list[Any]) -> None:
        if self._hub and self._hub.open:
            self._read_hub(self._hub)
        if self._port:
            if any(key.fileobj is self._port.listener for key, _ in events):
                self._port.accept()
            self._read_peers(self._port)

    def _read_peers(self, port: ControlPort) -> None:
        for peer in list(port.peers):
            try:
                for message in peer.channel.receive():
                    self._note(peer, message)
            except (Malformed, ValueError, KeyError, TypeError) as error:
                _log.warning("dropped %s from %s", error, peer.name)
                port.drop(peer)
                continue
            if not peer.channel.open:
                port.drop(peer)
                self._lost(peer)

    def _note(self, peer: Peer, message: dict[str, Any]) -> None:
        rank = message["rank"]
        peer.rank, peer.heard = rank, time.monotonic()
        self.table[rank] = RankStatus(**message["status"])

    def _read_hub(self, hub: Channel) -> None:
        try:
            messages = hub.receive()
        except Malformed as error:
            _log.warning("dropped %s from rank 0", error)
            hub.close()
            messages = []
        for message in messages:
            self._hub_heard = time.monotonic()
            if "verdict" in message:
                self._end(message["verdict"])
            if "probe" in message:
                self._silent_addresses = silent_addresses(self.following)
                self._report(hub)
            if "table" in message:
                self.table = [RankStatus(**row) for row in message["table"]]
        if not hub.open:
            self._selector.unregister(hub.sock)

    def _lost(self, peer: Peer) -> None:
        if peer.rank is not None and not self.table[peer.rank].left:
            self._conclude_later(peer.rank)

    def _tick(self) -> None:
        now = time.monotonic()
        elapsed, self._ticked = now - self._ticked, now
        self.table[self.rank] = self._own_status(now)
        self._ports.clear()
        if self._port:
            self._port.listen()
            self._port.drop_silent_strangers(now)
            self._end_the_silent(now)
            self._end_where_due(range(len(self.table)), elapsed)
            self._probe_where_due()
            self._say_how_it_is()
            return
        is_connected = self._hub is not None and self._hub.open
        if is_connected:
            self._say_how_it_is()  # also to a rank 0 that has left, as it may wait for all
        if self.table[0].left:
            # As it should; from here on this rank knows of itself only.
            self._end_where_due([self.rank], elapsed)
        elif is_connected and now - self._hub_heard > self.timeout_seconds:
            self._conclude(self._silence(0, now - self._hub_heard))
        elif not is_connected and not self._hub_died:
            self._hub_died = True
            self._conclude_later(0)

    def _end_the_silent(self, now: float) -> None:
        for peer in self._peers:
            silent = now - peer.heard
            # One that has left reports no more. Its connection stays where MPI waits at its end for all ranks.
            if peer.rank is not None and not self.table[peer.rank].left and silent > self.timeout_seconds:
                self._conclude(self._silence(peer.rank, silent))

    def _own_status(self, now: float) -> RankStatus:
        number, operation, _ = self.progress.last
        frame = sys._current_frames().get(self._main or 0)
        place = (id(frame), frame.f_lasti if frame else 0, number, self.progress.num_reports, self._work())
        if place != self._place:
            self._place, self._moved = place, now
        host = self.table[self.rank].host
        idle, phase = now - self._moved, self.progress.phase
        needs_others, lost_peer = self.progress.needs_others, self.progress.lost_peer
        return RankStatus(
            host,
            number,
            operation,
            idle,
            phase,
            needs_others,
            left=self._has_left,
            lost_peer=lost_peer,
            silent_addresses=self._silent_addresses,
        )

    def _work(self) -> int:
        """Tenths of a second that the processor has worked, where that counts as progress."""
        if self.progress.phase not in BY_PROCESSOR or self.progress.needs_others:
            return 0
        return int(10 * (time.process_time() - time.thread_time()))

    def _end_where_due(self, ranks: Sequence[int], elapsed: float) -> None:
        reason = self._judge.reason_to_end(self.table, ranks, elapsed)
        if reason:
            self._conclude(reason)

    def _probe_where_due(self) -> None:
        is_due = self._judge.must_probe(self.table)
        if is_due and not self._has_probed:
            for peer in self._peers:
                peer.channel.send({"probe": True})
            self._silent_addresses = silent_addresses(self.following)
        self._has_probed = is_due

    def _silence(self, rank: int, seconds: float) -> str:
        return f"{self._name(rank)} has not answered for {seconds:.0f} s"

    def _name(self, rank: int) -> str:
        return rank_names(self.table, [rank])

    def _conclude_later(self, rank: int) -> None:
        reason = f"{self._name(rank)} died"
        threading.Timer(GRACE_SECONDS, self._conclude, [reason]).start()

    def _conclude(self, reason: str) -> None:
        lines = [f"comm: the job ends: {reason}. The last operation of each rank:"]
        for rank, status in enumerate(self.table):
            extra = f", in the phase {status.phase!r}" if status.phase else ""
            extra += ", has left" if status.left else ""
            where = f"#{status.number} {status.operation} for {status.idle_seconds:.0f} s"
            lines.append(f"  {self._name(rank)}: {where}{extra}")
        text = "\n".join(lines)
        for peer in self._peers:
            peer.channel.send({"verdict": text})
        self._end(text)

    def _end(self, text: str) -> None:
        # One write, as several ranks may share the terminal.
        os.write(2, f"{text}\n".encode())
        os._exit(1)
