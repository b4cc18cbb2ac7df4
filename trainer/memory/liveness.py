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


@dataclass(frozen=True)
class Buffer:
    """Memory of one or more arrays.

    Attributes:
        shape: of the array it was made for.
        num_bytes: its size.
        born, died: steps of the execution at which it comes and goes; died is past the end for results.
        is_result: the function returns it.
    """

    shape: tuple[int, ...]
    num_bytes: int
    born: int
    died: int
    is_result: bool


@dataclass
class Lifetimes:
    """When each buffer of a computation is there.

    Attributes:
        buffers: all of them, but those of inputs that the caller keeps.
        num_steps: number of operations.
        made_at: step at which each result was made, in the order of the results.
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
    tape, waiting, position = [root], [], 0
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
        graph: the traced function.
        given_up: inputs that nobody else holds, with their bytes: they count, until their last reader has run.
    """
    return _Walk(graph, given_up or {}).run()


class _Walk:
    """The state of one walk: which buffer each array has, who still reads it, whether its rows are in order."""

    def __init__(self, graph: Graph, given_up: dict[str, int]) -> None:
        self.graph = graph
        self.readers = Counter(name for op in graph.operations for name in op.inputs)
        self.readers.update(graph.outputs)
        self.owners: Counter[int] = Counter()
        self.in_order: dict[str, bool] = {}
        self.buffer_of: dict[str, int | None] = {}
        self.shapes: list[tuple[int, ...]] = []
        self.sizes: list[int] = []
        self.born: list[int] = []
        self.died: list[int | None] = []
        for name, num_bytes in given_up.items():
            self._make(name, (), num_bytes, 0)

    def run(self) -> Lifetimes:
        order = execution_order(self.graph)
        made_at = {}
        for step, index in enumerate(order):
            operation = self.graph.operations[index]
            self._place(operation, step)
            made_at |= dict.fromkeys(operation.outputs, step)
            for name in operation.outputs:
                if not self.readers[name]:
                    self._drop(name, step)
            for name in operation.inputs:
                self.readers[name] -= 1
                if not self.readers[name]:
                    self._drop(name, step)
        results = {self.buffer_of.get(name) for name in self.graph.outputs}
        buffers = [
            Buffer(shape, size, born, len(order) if died is None else died, number in results)
            for number, (shape, size, born, died) in enumerate(
                zip(self.shapes, self.sizes, self.born, self.died, strict=True)
            )
        ]
        return Lifetimes(buffers, len(order), [made_at.get(name, 0) for name in self.graph.outputs])

    def _place(self, operation: Operation, step: int) -> None:
        """Give each result of an operation its buffer: that of an input, or a new one."""
        taken: set[int] = set()
        for position, name in enumerate(operation.outputs):
            source = self._viewed(operation, position)
            if source is not None:
                self._share(name, self.buffer_of.get(source))
                keeps_order = operation.name not in _SCATTERS
                self.in_order[name] = keeps_order and self.in_order.get(source, True)
                continue
            reused = self._reusable(operation, operation.num_bytes[position], taken)
            if reused is None:
                self._make(name, operation.shapes[position], operation.num_bytes[position], step)
            else:
                taken.add(reused)
                self._share(name, reused)

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

    def _reusable(self, operation: Operation, num_bytes: int, taken: set[int]) -> int | None:
        """The buffer of an input that is read here for the last time and has the result's size."""
        if operation.name not in _ELEMENTWISE:
            return None
        for name in operation.inputs:
            buffer = self.buffer_of.get(name)
            is_last = self.readers[name] == operation.inputs.count(name)
            if buffer is None or buffer in taken or not is_last or self.owners[buffer] != 1:
                continue
            if self.sizes[buffer] == num_bytes:
                return buffer
        return None

    def _make(self, name: str, shape: tuple[int, ...], num_bytes: int, step: int) -> None:
        self.shapes.append(shape)
        self.sizes.append(num_bytes)
        self.born.append(step)
        self.died.append(None)
        self._share(name, len(self.sizes) - 1)

    def _share(self, name: str, buffer: int | None) -> None:
        self.buffer_of[name] = buffer
        if buffer is not None:
            self.owners[buffer] += 1

    def _drop(self, name: str, step: int) -> None:
        buffer = self.buffer_of.get(name)
        if buffer is not None:
            self.owners[buffer] -= 1
            if not self.owners[buffer]:
                self.died[buffer] = step
