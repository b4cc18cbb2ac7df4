"""`Group`: the collectives of `mx.distributed`, alike on every backend.

A group owns one stream and issues everything on it, from one Python thread, also what only brings
a result into shape: a compute stream that waits for a peer could do nothing else, and a GPU's
is ended for it. Results are lazy: every rank must evaluate the same operations in the same order. What a backend lacks is built
from what it has (see `capabilities.py`). With one rank every collective is the identity.
"""

import os
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from comm.arguments import check_rank, check_reach, checked_axis
from comm.capabilities import CAPABILITIES, Capabilities
from comm.connections import Connection, Connections
from comm.debug import check_calls, encode_call
from comm.progress import Progress
from comm.typed import custom_function, integers

SOLO = Capabilities("none", True, True, "none", "cpu")


class Group:
    """Ranks that communicate.

    Args:
        native: MLX's group, or None for a group of one rank.
        backend: Name of the backend that carries it.
        members: World rank of each rank of this group. Default: 0 .. size-1.
        capabilities: The backend's row. Default: the one in the table.
        engine: What offers MLX's collectives. Default: `mx.distributed`.
        stream: Stream of all operations. Default: a new one on the backend's device.
        splitter: Makes sub-groups where MLX cannot: `splitter(group, color, key) -> Group`.
        progress: Where operations are recorded. Default: a new record.
        connections: What keeps MLX's groups open, for all groups of a world. Default: a new one.
    """

    _connection: Connection | None = None

    def __init__(
        self,
        native: mx.distributed.Group | None,
        backend: str,
        *,
        members: tuple[int, ...] | None = None,
        capabilities: Capabilities | None = None,
        engine: Any = mx.distributed,
        stream: mx.Stream | None = None,
        splitter: "Callable[[Group, int, int], Group] | None" = None,
        progress: Progress | None = None,
        connections: Connections | None = None,
    ):
        self._native = native
        self._backend = backend
        self._rank = native.rank() if native is not None else 0
        self._size = native.size() if native is not None else 1
        self.capabilities = capabilities or CAPABILITIES.get(backend, SOLO)
        self.members = members or tuple(range(self._size))
        self.progress = progress or Progress()
        self.connections = connections or Connections()
        self.watchdog: Any = None
        self._engine = engine
        self._stream = stream
        self._connect()
        self.splitter = splitter
        self._debug = os.environ.get("COMM_DEBUG") == "1"
        self._num_calls = 0

    @property
    def rank(self) -> int:
        """This process's number in the group."""
        return self._rank

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self._size

    @property
    def backend(self) -> str:
        """Name of the backend; "none" for a group made without one."""
        return self._backend

    @property
    def stream(self) -> mx.Stream:
        """The stream that all of this group's operations run on."""
        if self._stream is None:
            device = mx.Device(getattr(mx, self.capabilities.device), 0)
            self._stream = mx.default_stream(device) if self.capabilities.default_stream else mx.new_stream(device)
            self._connect()
        return self._stream

    def __del__(self) -> None:
        self._disconnect()

    def __repr__(self) -> str:
        return f"Group(rank={self.rank}, size={self.size}, backend={self.backend!r})"

    def all_sum(self, x: mx.array) -> mx.array:
        """Sum of `x` (...) over the ranks (...), on every rank; the logical or for bool.

        >>> group.all_sum(mx.array([group.rank, 1])).tolist()  # two ranks
        [1, 2]

        Backward: the cotangent unchanged (right when all ranks compute the same loss from it;
        see `sum_over_group` and `copy_to_group`).
        """
        return self._reduce("all_sum", x)

    def all_max(self, x: mx.array) -> mx.array:
        """Largest value of `x` (...) over the ranks (...), element by element.

        >>> group.all_max(mx.array([group.rank, 1])).tolist()  # two ranks
        [1, 1]

        Backward: the cotangent goes to the ranks that hold the largest value, in equal parts.
        """
        return self._extreme("all_max", x)

    def all_min(self, x: mx.array) -> mx.array:
        """Smallest value of `x` (...) over the ranks (...), element by element. Example and backward: as `all_max`."""
        return self._extreme("all_min", x)

    def all_gather(self, x: mx.array, axis: int = 0) -> mx.array:
        """The ranks' `x` (N, ...) of equal shapes, concatenated along `axis` in rank order: (size * N, ...).

        >>> group.all_gather(mx.array([[group.rank, 5]])).tolist()  # two ranks
        [[0, 5], [1, 5]]

        Scalars give a vector (size,). Backward: this rank's slice of its own cotangent.
        """
        if self.size == 1:
            return x if x.ndim else x[None]
        axis = checked_axis(x, axis)
        if x.size == 0:
            return mx.concatenate([x] * self.size, axis)
        self._enter("all_gather", x)
        rows = self._carried(x[None] if axis else x)
        gathered = self._engine.all_gather(rows, group=self._native, stream=self.stream)
        with mx.stream(self.stream):
            if axis:
                gathered = mx.concatenate([part[0] for part in mx.split(gathered, self.size)], axis)
            return self._leave(gathered.astype(x.dtype))

    def reduce_scatter(self, x: mx.array, axis: int = 0) -> mx.array:
        """This rank's part, along `axis`, of the sum of `x` (N, ...) over the ranks: (N / size, ...).

        >>> group.reduce_scatter(mx.array([1, 2, 3, 4])).tolist()  # rank 0 of two; rank 1 gets [6, 8]
        [2, 4]

        Backward: the ranks' cotangents gathered along `axis`.

        Raises:
            ValueError: The axis does not divide into equal parts.
        """
        if self.size == 1:
            return x
        axis = checked_axis(x, axis)
        if x.ndim == 0 or x.shape[axis] % self.size:
            where = f"reduce_scatter of shape {x.shape} along axis {axis}"
            raise ValueError(f"{where}: axis {axis} must be divisible by {self.size}.")

        @custom_function
        def scatter(x):
            return self._reduce_scatter(x, axis)

        @scatter.vjp
        def scatter_vjp(x, cotangent, output):
            return self.all_gather(cotangent, axis)

        with mx.stream(self.stream):  # the function's result is the collective's
            return scatter(x)

    def broadcast(self, x: mx.array, root: int = 0) -> mx.array:
        """The root's `x` (...) on every rank, bit by bit; the others give the shape and dtype.

        >>> group.broadcast(mx.array([group.rank + 7])).tolist()  # two ranks
        [7]

        Backward: none (the gradient is zero).
        """
        check_rank(root, self.size, "root")
        if self.size == 1 or x.size == 0:
            return x
        # Summed as unsigned integers: exact for NaN payloads, -0.0 and bool alike.
        flat = mx.stop_gradient(x).reshape(-1)
        bits = flat.view(mx.uint8 if x.nbytes % 4 else mx.uint32)
        if self.rank != root:
            bits = mx.zeros_like(bits)
        self._enter("broadcast", x)
        total = self._engine.all_sum(bits, group=self._native, stream=self.stream)
        with mx.stream(self.stream):
            return self._leave(total.view(x.dtype).reshape(x.shape))

    def send(self, x: mx.array, dst: int) -> mx.array:
        """Sends `x` (...) to rank `dst`; the result is `x`. Evaluate it: an unused send never leaves.

        >>> mx.eval(group.send(mx.array([3]), 1) if group.rank == 0 else group.recv((1,), mx.int32, 0))

        Backward: none; see `send_forward`.

        Raises:
            ValueError: The backend cannot reach `dst` from here.
        """
        self._check_reach(dst, "send to")
        self.progress.record(f"send to {dst}", x.shape, x.dtype)
        return self._engine.send(x, dst, group=self._native, stream=self.stream)

    def recv(self, shape: tuple[int, ...], dtype: mx.Dtype, src: int) -> mx.array:
        """The array (shape) that rank `src` sends; shape and dtype must be the sender's. For an example see `send`.

        Backward: none; see `recv_forward`.

        Raises:
            ValueError: The backend cannot reach `src` from here.
        """
        self._check_reach(src, "receive from")
        self.progress.record(f"recv from {src}", shape, dtype)
        return self._engine.recv(shape, dtype, src, group=self._native, stream=self.stream)

    def recv_like(self, x: mx.array, src: int) -> mx.array:
        """`recv` with the shape and dtype of `x`."""
        return self.recv(x.shape, x.dtype, src)

    def barrier(self) -> None:
        """Returns once every rank is here."""
        if self.size > 1:
            mx.eval(self.all_sum(mx.zeros((1,))))
            self.progress.record("barrier passed", (), None)

    def split(self, color: int, key: int = -1) -> "Group":
        """The group of the ranks that pass the same `color`, ordered by `key`, then by rank.

        >>> group.split(group.rank % 2).size  # four ranks: 0 with 2, and 1 with 3
        2

        A collective of this group; where MLX cannot split (ring, JACCL), of the whole world.

        Args:
            color: Which of the new groups this rank joins; 0 or more.
            key: Order within it. Default: this group's order.
        """
        if color < 0:
            raise ValueError(f"color is {color}; it must be 0 or more.")
        if self.splitter is not None:
            return self.splitter(self, color, key)
        if self.size == 1:
            return self
        if self.capabilities.split:
            return self._native_split(color, key)
        raise ValueError(f"This {self.backend} group was made without a way to split it.")

    def adopt(self, native: mx.distributed.Group) -> None:
        """Goes on over another connection between the same ranks in the same order."""
        same = (native.rank(), native.size()) == (self.rank, self.size)
        assert same, f"{self} cannot become rank {native.rank()} of {native.size()}"
        self._disconnect()
        self._native = native
        self._connect()

    def _connect(self) -> None:
        if self._native is not None and self._stream is not None:
            self._connection = self.connections.add(self._native, self._stream)

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.is_dropped = True

    def _native_split(self, color: int, key: int) -> "Group":
        self.connections.close_dropped()
        order = key if key >= 0 else self.rank
        row = mx.array([color, order, self.members[self.rank]], dtype=mx.int32)
        rows = integers(self.all_gather(row[None]))
        same = sorted((k, rank) for rank, (c, k, _) in enumerate(rows) if c == color)
        members = tuple(rows[rank][2] for _, rank in same)
        assert self._native is not None, "a group of one rank is not split by MLX"
        native = self._native.split(color, order)
        if native.size() == 1:
            return Group(None, self.backend, members=members, progress=self.progress)
        shared = {"engine": self._engine, "progress": self.progress, "connections": self.connections}
        stream = self.stream if self.capabilities.shared_stream else None
        return Group(native, self.backend, members=members, capabilities=self.capabilities, stream=stream, **shared)

    def _reduce(self, operation: str, x: mx.array) -> mx.array:
        if self.size == 1 or x.size == 0:
            return x
        self._enter(operation, x)
        call = getattr(self._engine, operation)
        total = call(self._carried(x), group=self._native, stream=self.stream)
        with mx.stream(self.stream):
            if x.dtype == mx.bool_:
                total = total != 0
            return self._leave(total.astype(x.dtype))

    def _extreme(self, operation: str, x: mx.array) -> mx.array:
        if self.size == 1 or not mx.issubdtype(x.dtype, mx.floating):
            return self._reduce(operation, x)

        @custom_function
        def extreme(x):
            return self._reduce(operation, x)

        @extreme.vjp
        def extreme_vjp(x, cotangent, output):
            holds = (x == output).astype(cotangent.dtype)
            return cotangent * holds / self.all_sum(holds)

        with mx.stream(self.stream):
            return extreme(x)

    def _reduce_scatter(self, x: mx.array, axis: int) -> mx.array:
        if not self.capabilities.reduce_scatter:
            total = self._reduce("all_sum", x)
            with mx.stream(self.stream):
                # Without the copy the slice would keep the whole sum in memory.
                return mx.contiguous(mx.split(total, self.size, axis)[self.rank])
        self._enter("reduce_scatter", x)
        rows = mx.moveaxis(self._carried(x), axis, 0)
        part = self._engine.sum_scatter(rows, group=self._native, stream=self.stream)
        with mx.stream(self.stream):
            return self._leave(mx.moveaxis(part, 0, axis).astype(x.dtype))

    def _enter(self, operation: str, x: mx.array) -> None:
        self.progress.record(operation, x.shape, x.dtype)
        if self._debug:
            self._num_calls += 1
            entry = encode_call(self._num_calls, operation, x)
            rows = self._engine.all_gather(entry, group=self._native, stream=self.stream)
            check_calls(rows, self.members)

    def _leave(self, result: mx.array) -> mx.array:
        if self._debug:
            mx.eval(result)
        return result

    def _carried(self, x: mx.array) -> mx.array:
        dtype = self.capabilities.widen.get(str(x.dtype).split(".")[-1])
        return x.astype(getattr(mx, dtype)) if dtype else x

    def _check_reach(self, peer: int, what: str) -> None:
        check_reach(self.rank, peer, self.size, self.capabilities, self.backend, what)


def solo() -> Group:
    """A group of one rank, made without starting any backend."""
    return Group(None, "none")
