"""Rank 0's end of the control connections: the port that every rank reports to.

Anybody who reaches the port can connect. A connection that has not said which rank it is counts
as a stranger; there are only so many of them, and they give way first where the process has no
file descriptor left. Nothing a stranger does raises here.
"""

import errno
import logging
import selectors
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from comm.heartbeat import Channel
from comm.probe import interfaces

_log = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0  # for one address of rank 0 to answer
UNKNOWN_SECONDS = 10.0  # for a connection to say which rank it is
NUM_STRANGERS = 32  # beside one for each rank, as all ranks may connect at once
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


@dataclass(eq=False)
class Peer:
    """Rank 0's view of a connection."""

    channel: Channel
    name: str
    rank: int | None = None
    heard: float = field(default_factory=time.monotonic)


class ControlPort:
    """Accepts connections and drops them; reading them is the watchdog's.

    Args:
        listener: The listening socket.
        secret: The job's secret.
        selector: Told of the listener and of every connection.
        num_ranks: Ranks of the job.
    """

    def __init__(
        self, listener: socket.socket, secret: str, selector: selectors.BaseSelector, num_ranks: int
    ):
        self.listener, self.peers = listener, list[Peer]()
        self._secret, self._selector = secret, selector
        self._num_strangers = NUM_STRANGERS + num_ranks
        self._listens = False
        listener.setblocking(False)
        self.listen()

    def listen(self) -> None:
        """Lets the selector tell of new connections, also again after `accept` gave up."""
        if not self._listens:
            self._selector.register(self.listener, selectors.EVENT_READ)
            self._listens = True

    def accept(self) -> None:
        """Takes in one connection; drops the oldest stranger where there are too many."""
        try:
            sock, address = self.listener.accept()
        except OSError as error:
            if error.errno in _EXHAUSTED:
                self._make_room()
            return
        try:
            peer = Peer(Channel(sock, self._secret, listener=True), f"{address[0]}:{address[1]}")
        except OSError:  # gone again, which macOS says on setting an option
            sock.close()
            return
        self.peers.append(peer)
        self._selector.register(sock, selectors.EVENT_READ)
        if len(self._strangers()) > self._num_strangers:
            self.drop(self._strangers()[0])

    def drop(self, peer: Peer) -> None:
        """Closes one connection."""
        self._selector.unregister(peer.channel.sock)
        peer.channel.close()
        self.peers.remove(peer)

    def drop_silent_strangers(self, now: float) -> None:
        """Closes the connections that never said which rank they are."""
        for peer in self._strangers():
            if now - peer.heard > UNKNOWN_SECONDS:
                _log.warning("dropped a connection from %s that never said who it is", peer.name)
                self.drop(peer)

    def _strangers(self) -> list[Peer]:
        return [peer for peer in self.peers if peer.rank is None]

    def _make_room(self) -> None:
        strangers = self._strangers()
        if strangers:
            self.drop(strangers[0])
        elif self._listens:
            # The waiting connection would wake the selector without end.
            self._selector.unregister(self.listener)
            self._listens = False


def listen(own: Mapping[str, Any]) -> tuple[socket.socket, list[tuple[str, int]]]:
    """Rank 0's listener and where others may reach it.

    Where no launcher says which address all hosts reach, that is any of this host's: in a ring of cables the first one
    leads to one neighbour only.
    """
    if own["control"]:
        listener = socket.create_server((own["control"], 0))
        return listener, [listener.getsockname()[:2]]
    found = [ip for interface in interfaces().values() for ip in interface["ips"] if not ip.startswith("127.")]
    addresses = list(dict.fromkeys([*own["ring"], *found]))
    listener = socket.create_server(("" if len(addresses) > 1 else addresses[0], 0))
    return listener, [(address, listener.getsockname()[1]) for address in addresses]


def reach(endpoints: list[tuple[str, int]]) -> socket.socket | None:
    """A connection to the first of the addresses that answers."""
    for ip, port in endpoints:
        try:
            return socket.create_connection((ip, port), timeout=CONNECT_SECONDS)
        except OSError:
            continue
    return None
