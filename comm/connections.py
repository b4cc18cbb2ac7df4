"""MLX's groups, kept open for as long as operations may run over them.

MLX's running operations do not keep their group alive. When Python lets go of it, a ring's sockets
are closed under them and MPI crashes: after a token that was generated ahead and dropped, say, or
at the end of a program that did not look at its last result.
"""

from dataclasses import dataclass

import mlx.core as mx


@dataclass(eq=False)
class Connection:
    """One of MLX's groups, the stream of its operations, and whether only these may still use it."""

    native: mx.distributed.Group
    stream: mx.Stream
    is_dropped: bool = False


class Connections:
    """The connections of one world and its sub-groups."""

    def __init__(self) -> None:
        self._open: list[Connection] = []

    def add(self, native: mx.distributed.Group, stream: mx.Stream) -> Connection:
        """Keeps `native` until it is marked as dropped, and then until `close_dropped`."""
        self._open.append(Connection(native, stream))
        return self._open[-1]

    def close_dropped(self) -> None:
        """Waits for the operations of dropped groups, and lets MLX close these."""
        for connection in [one for one in self._open if one.is_dropped]:
            mx.synchronize(connection.stream)
            self._open.remove(connection)

    def finish(self) -> None:
        """Waits for all operations; for the end of the program."""
        for connection in self._open:
            try:
                mx.synchronize(connection.stream)
            except RuntimeError:
                pass  # a peer is gone, which the watchdog tells; nobody looks at the result
