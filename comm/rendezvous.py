"""Every rank says hello to rank 0 before MLX connects, so that a missing rank is named.

MLX waits for a rank that never starts without end and without a word. This needs what
`python -m comm launch` leaves: an address of each rank that all hosts reach, the job's secret,
and a port of rank 0: the first of the ring's hostfile, until MLX takes it, or for MPI, whose ranks
have no hostfile, `COMM_MEETING_PORT` where all of them are on this host.
"""

import json
import selectors
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass

from comm.control_port import ControlPort
from comm.environment import ring_hosts
from comm.heartbeat import Channel, Malformed

RETRY_SECONDS = 0.1
MEETING_PORT = "COMM_MEETING_PORT"
_NEEDED = ("COMM_ADDRESSES", "COMM_SECRET")


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks of a job meet.

    Attributes:
        rank: This rank's number.
        addresses: An address of each rank that all hosts reach.
        port: The port of rank 0.
        secret: The job's secret.
    """

    rank: int
    addresses: tuple[str, ...]
    port: int
    secret: str

    def meet(self, timeout_seconds: float) -> None:
        """Returns once every rank has called this.

        Raises:
            TimeoutError: Ranks are missing after `timeout_seconds`; the text names them.
        """
        if self.rank == 0:
            self._receive_all(timeout_seconds)
        else:
            self._say_hello(timeout_seconds)

    def _receive_all(self, timeout_seconds: float) -> None:
        deadline = time.monotonic() + timeout_seconds
        everyone = set(range(len(self.addresses)))
        with _listen(self.addresses[0], self.port) as listener:
            selector = selectors.DefaultSelector()
            control = ControlPort(listener, self.secret, selector, len(everyone))
            missing = everyone - {0}
            while missing and time.monotonic() < deadline:
                selector.select(RETRY_SECONDS)
                control.listen()
                control.accept()
                _read_hellos(control, len(everyone))
                missing = everyone - {0, *(peer.rank for peer in control.peers)}
        # The port is free again before anyone is told, as MLX of the last rank connects to it.
        names = " and ".join(f"rank {rank} ({self.addresses[rank]})" for rank in sorted(missing))
        text = f"{names} did not start within {timeout_seconds:g} s" if missing else ""
        for peer in control.peers:
            peer.channel.send({"missing": text})
            peer.channel.close()
        selector.close()
        if missing:
            raise TimeoutError(text)

    def _say_hello(self, timeout_seconds: float) -> None:
        deadline = time.monotonic() + timeout_seconds
        while (left := deadline - time.monotonic()) > 0:
            try:
                sock = socket.create_connection((self.addresses[0], self.port), timeout=left)
                channel = Channel(sock, self.secret, listener=False)
            except OSError:
                time.sleep(RETRY_SECONDS)
                continue
            # Rank 0 may have started later and then waits for longer than this rank.
            answer = self._answer(channel, deadline + timeout_seconds)
            channel.close()
            if answer:
                raise TimeoutError(answer)
            if answer is not None:
                return
            time.sleep(RETRY_SECONDS)
        raise TimeoutError(
            f"rank 0 ({self.addresses[0]}) did not start within {timeout_seconds:g} s"
        )

    def _answer(self, channel: Channel, deadline: float) -> str | None:
        """Rank 0's text, "" where all ranks are there; None where it closed the connection."""
        with selectors.DefaultSelector() as selector:
            selector.register(channel.sock, selectors.EVENT_READ)
            greeted = False
            while channel.open and time.monotonic() < deadline:
                if not selector.select(RETRY_SECONDS):
                    continue
                try:
                    messages = channel.receive()
                except Malformed:
                    return None
                if messages:
                    return messages[0]["missing"]
                if not greeted:
                    channel.send({"rank": self.rank})
                    greeted = True
        return None


def rendezvous_of(environ: Mapping[str, str]) -> Rendezvous | None:
    """Where this job meets; None where the environment does not say so."""
    if not all(environ.get(name) for name in _NEEDED):
        return None
    addresses, secret = tuple(json.loads(environ["COMM_ADDRESSES"])), environ["COMM_SECRET"]
    if MEETING_PORT in environ and "OMPI_COMM_WORLD_RANK" in environ:
        if len(addresses) != int(environ["OMPI_COMM_WORLD_SIZE"]):
            return None
        return Rendezvous(int(environ["OMPI_COMM_WORLD_RANK"]), addresses, int(environ[MEETING_PORT]), secret)
    if not all(environ.get(name) for name in ("MLX_HOSTFILE", "MLX_RANK")):
        return None
    hosts = ring_hosts(environ)
    if not all(addresses) or not hosts or len(addresses) != len(hosts):
        return None
    return Rendezvous(int(environ["MLX_RANK"]), addresses, int(hosts[0][0].rsplit(":", 1)[1]), secret)


def _listen(address: str, port: int) -> socket.socket:
    listener = socket.socket()
    # As MLX and the launcher do, which hold the same port.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind((address, port))
    listener.listen(128)
    return listener


def _read_hellos(control: ControlPort, num_ranks: int) -> None:
    for peer in list(control.peers):
        try:
            for message in peer.channel.receive():
                if message["rank"] in range(1, num_ranks):
                    peer.rank = message["rank"]
        except (Malformed, ValueError, KeyError, TypeError):
            control.drop(peer)
            continue
        if not peer.channel.open:
            control.drop(peer)
    control.drop_silent_strangers(time.monotonic())
