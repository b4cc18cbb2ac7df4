"""How much memory a computation will need, from its graph alone: nothing is evaluated, no weight has to exist.

The operations of a traced function (`trainer.memory.tracing`) are walked through in the order in which MLX evaluates
them, with a buffer for each result until its last reader has run. Views and results that take over the
buffer of an input cost nothing. Assumes that operations run one after the other: what a device
allocates ahead of time is not in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from trainer.memory.tracing import Graph, Operation

# Results that share their input's memory.
_VIEWS = frozenset(
    "Transpose Broadcast ExpandDims Squeeze Slice Split AsStrided StopGradient Depends View Copy "
    "CustomTransforms Contiguous BroadcastAxes".split()
)
# Views too, but only of rows that lie one behind the other; a copy otherwise.
_RESHAPES = frozenset(("Reshape", "Flatten", "Unflatten"))
_SCATTERS = frozenset(("Transpose", "Broadcast", "Slice", "Split", "AsStrided"))
# Results that MLX writes over an input of the same size when nobody else needs it.
_ELEMENTWISE = frozenset(
    "Abs Add AsType Cos Divide Equal Erf Exp Expm1 Greater GreaterEqual Less LessEqual Log Log1p LogAddExp "
    "LogicalAnd LogicalNot LogicalOr Maximum Minimum Multiply Negative NotEqual Power Remainder RMSNorm "
    "Round Select Sigmoid Sign Sin Softmax Sqrt Square Subtract Tanh Scan".split()
)
# MLX looks at most so many results ahead when it orders operations (MLX_BFS_MAX_WIDTH).
_WIDTH = 20


@dataclass(eq=False)
class Buffer:
    """Memory of one or more arrays.

    Attributes:
        shape: The shape of the array it was made for.
        num_bytes: Its size.
        born, died: Steps of the execution at which it comes and goes; died is past the end for results.
        is_result: The function returns it.
        num_owners: Arrays in it that are still to be read, during the walk.
    """

    shape: tuple[int, ...]
    num_bytes: int
    born: int
    died: int
    is_result: bool = False
    num_owners: int = 0


@dataclass
class Lifetimes:
    """When each buffer of a computation is there.

    Attributes:
        buffers: All of them, but those of inputs that the caller keeps.
        num_steps: Number of operations.
        made_at: Step at which each result was made, in the order of the results.
    """

    buffers: list[Buffer] = field(default_factory=list)
    num_steps: int = 0
    made_at: list[int] = field(default_factory=list)

    def bytes_over_time(
        self, size: Callable[[Buffer], float] = lambda buffer: buffer.num_bytes
    ) -> np.ndarray:
        """Bytes at each step; `size` says what a buffer counts, such as a part of it on one of several ranks."""
        change = np.zeros(self.num_steps + 2)
        for buffer in self.buffers:
            counted = size(buffer)
            change[buffer.born] += counted
            change[buffer.died + 1] -= counted
        return np.cumsum(change)[: self.num_steps]


def execution_order(graph: Graph) -> list[int]:
    """Indices of the operations in the order in which MLX evaluates them.

    MLX collects operations from the results backwards, breadth first with a bounded width, takes one in when
    all its readers are in, and runs them in reverse.
    """
    made_by = {name: i for i, op in enumerate(graph.operations) for name in op.outputs}
    needs = [[made_by[name] for name in op.inputs if name in made_by] for op in graph.operations]
    needs.append([made_by[name] for name in graph.outputs if name in made_by])
    root = len(graph.operations)
    readers: Counter[int] = Counter()
    found, pending = {root}, [root]
    while pending:
        for needed in needs[pending.pop()]:
            readers[needed] += 1
            if needed not in found:
                found.add(needed)
                pending.append(needed)
    tape, position = [root], 0
    waiting: list[tuple[int, int]] = []
    while position < len(tape) or waiting:
        if position < len(tape):
            operation, start = tape[position], 0
            position += 1
        else:
            operation, start = waiting.pop()
        for i in range(start, len(needs[operation])):
            if len(tape) - position >= _WIDTH:
                waiting.append((operation, i))
                break
            needed = needs[operation][i]
            readers[needed] -= 1
            if readers[needed] == 0:
                tape.append(needed)
    return tape[:0:-1]


def lifetimes(graph: Graph, given_up: dict[str, int] | None = None) -> Lifetimes:
    """Walk through the graph and note when each buffer comes and goes.

    Args:
        graph: The traced function.
        given_up: Inputs that nobody else holds, with their bytes: they count, until their last reader has run.
    """
    return _Walk(graph, given_up or {}).run()


class _Walk:
    """The state of one walk: which buffer each array has, who still reads it, whether its rows are in order."""

    def __init__(self, graph: Graph, given_up: dict[str, int]) -> None:
        self.graph = graph
        self.order = execution_order(graph)
        self.readers = Counter(name for op in graph.operations for name in op.inputs)
        self.readers.update(graph.outputs)
        self.in_order: dict[str, bool] = {}
        self.buffers: list[Buffer] = []
        self.buffer_of: dict[str, Buffer | None] = {}
        for name, num_bytes in given_up.items():
            self._share(name, self._made((), num_bytes, 0))

    def run(self) -> Lifetimes:
        made_at: dict[str, int] = {}
        for step, index in enumerate(self.order):
            operation = self.graph.operations[index]
            self._place(operation, step)
            made_at |= dict.fromkeys(operation.outputs, step)
            self.readers.subtract(operation.inputs)
            for name in (*operation.outputs, *dict.fromkeys(operation.inputs)):
                if not self.readers[name]:
                    self._drop(name, step)
        for name in self.graph.outputs:
            if buffer := self.buffer_of.get(name):
                buffer.is_result = True
        return Lifetimes(self.buffers, len(self.order), [made_at.get(name, 0) for name in self.graph.outputs])

    def _place(self, operation: Operation, step: int) -> None:
        """Give each result of an operation its buffer: that of an input, or a new one."""
        taken: list[Buffer] = []
        for position, name in enumerate(operation.outputs):
            source = self._viewed(operation, position)
            if source is not None:
                self._share(name, self.buffer_of.get(source))
                self.in_order[name] = operation.name not in _SCATTERS and self.in_order.get(source, True)
                continue
            buffer = self._reusable(operation, operation.num_bytes[position], taken)
            if buffer is None:
                buffer = self._made(operation.shapes[position], operation.num_bytes[position], step)
            taken.append(buffer)
            self._share(name, buffer)

    def _viewed(self, operation: Operation, position: int) -> str | None:
        """The input whose memory the result shares by its nature, if any."""
        if not operation.inputs:
            return None
        # Of several inputs, Depends passes the first ones through and CustomTransforms the last ones.
        if operation.name == "CustomTransforms":
            position += len(operation.inputs) - len(operation.outputs)
        source = operation.inputs[position if operation.name in ("Depends", "CustomTransforms") else 0]
        is_view = operation.name in _VIEWS
        is_view |= operation.name in _RESHAPES and self.in_order.get(source, True)
        return source if is_view else None

    def _reusable(self, operation: Operation, num_bytes: int, taken: list[Buffer]) -> Buffer | None:
        """The buffer of an input that is read here for the last time and has the result's size."""
        for name in operation.inputs if operation.name in _ELEMENTWISE else ():
            buffer = self.buffer_of.get(name)
            is_last = self.readers[name] == operation.inputs.count(name)
            if buffer is None or buffer in taken or not is_last or buffer.num_owners != 1:
                continue
            if buffer.num_bytes == num_bytes:
                return buffer
        return None

    def _made(self, shape: tuple[int, ...], num_bytes: int, step: int) -> Buffer:
        self.buffers.append(Buffer(shape, num_bytes, step, died=len(self.order)))
        return self.buffers[-1]

    def _share(self, name: str, buffer: Buffer | None) -> None:
        self.buffer_of[name] = buffer
        if buffer is not None:
            buffer.num_owners += 1

    def _drop(self, name: str, step: int) -> None:
        buffer = self.buffer_of.get(name)
        if buffer is not None:
            buffer.num_owners -= 1
            if not buffer.num_owners:
                buffer.died = step
