"""Trying the addresses of a neighbour: what answers, what refuses, what is silent."""

import socket
import time

from comm.cables import AnsweringPorts, silent_addresses


def test_only_an_address_that_says_nothing_is_silent() -> None:
    """Catches a living neighbour being blamed, a cut cable being missed, and an endless probe."""
    ports = AnsweringPorts(["127.0.0.1", "192.0.2.1"])  # the second is not this host's
    assert len(ports.endpoints) == 1
    with socket.create_server(("127.0.0.3", 0)) as closed:
        refusing = closed.getsockname()
    full = socket.create_server(("127.0.0.2", 0), backlog=0)
    waiting = [socket.socket() for _ in range(4)]
    for sock in waiting:
        sock.setblocking(False)
        sock.connect_ex(full.getsockname())
    start = time.monotonic()
    assert silent_addresses([*ports.endpoints, refusing, full.getsockname()]) == ["127.0.0.2"]
    assert time.monotonic() - start < 2
    for sock in (full, *waiting, *ports._listeners):
        sock.close()


def test_the_queue_never_fills() -> None:
    """Catches a neighbour that looks dead because others have knocked often."""
    ports = AnsweringPorts(["127.0.0.1"])
    for _ in range(300):
        assert silent_addresses(ports.endpoints) == []
        ports.clear()
    ports._listeners[0].close()
