"""Whether the next rank of the ring answers on the addresses that MLX's ring uses.

The control network may live while the cable between two ranks does not. So each rank listens on
its own ring addresses, beside MLX, and connects to its successor's when all ranks wait: each
cable of a ring is then tried once. Nothing is sent over these connections.
"""

import errno
import selectors
import socket
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import cast

ANSWER_SECONDS = 0.8  # far above a round trip; the watchdog of this rank stands still meanwhile
_ANSWERS = (0, errno.ECONNREFUSED)  # a refusal comes from the other end, too


class AnsweringPorts:
    """A port on each of this host's `addresses` to which others can connect."""

    def __init__(self, addresses: Iterable[str]):
        self._listeners = []
        for address in addresses:
            try:
                listener = socket.create_server((address, 0))
            except OSError:  # behind an address translation; a neighbour then tries nothing
                continue
            listener.setblocking(False)
            self._listeners.append(listener)

    @property
    def endpoints(self) -> list[tuple[str, int]]:
        """(address, port) of each."""
        return [listener.getsockname()[:2] for listener in self._listeners]

    def clear(self) -> None:
        """Ends what has connected, so that the queues never fill; call it now and then."""
        for listener in self._listeners:
            try:
                while True:
                    listener.accept()[0].close()
            except OSError:
                continue


def silent_addresses(
    endpoints: Sequence[tuple[str, int]], seconds: float = ANSWER_SECONDS
) -> list[str]:
    """The addresses that do not answer a connection within `seconds`; none where it cannot try."""
    with ExitStack() as opened:
        try:
            tries = [(opened.enter_context(socket.socket()), *endpoint) for endpoint in endpoints]
        except OSError:  # no file descriptor is left
            return []
        return _silent(tries, time.monotonic() + seconds)


def _silent(tries: Sequence[tuple[socket.socket, str, int]], deadline: float) -> list[str]:
    silent = []
    selector = selectors.PollSelector()  # takes no file descriptor
    for sock, address, port in tries:
        sock.setblocking(False)
        code = sock.connect_ex((address, port))
        if code == errno.EINPROGRESS:
            selector.register(sock, selectors.EVENT_WRITE, address)
        elif code not in _ANSWERS:
            silent.append(address)
    while selector.get_map() and (left := deadline - time.monotonic()) > 0:
        for key, _ in selector.select(left):
            sock = cast(socket.socket, selector.unregister(key.fileobj).fileobj)
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) not in _ANSWERS:
                silent.append(key.data)
    return silent + [key.data for key in selector.get_map().values()]
