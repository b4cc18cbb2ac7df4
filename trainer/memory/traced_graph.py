"""The whole graph of a computation, functions with a hand-written gradient included, without evaluating anything.

They are traced with stand-ins (`trainer.memory.stand_ins`), whose backward passes are put here where their markers say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from unittest import mock

import mlx.core as mx

from trainer.memory.graph import Graph, Operation, exported
from trainer.memory.stand_ins import Call, StandIns

# Between a marker and the array that it stands for.
_MARKER_STEPS = ("Reduce", "Squeeze", "ExpandDims", "Broadcast", "AsType", "Reshape")


def trace(function: Callable[..., list[mx.array]], arguments: Sequence[mx.array]) -> Graph:
    """The graph of `function(*arguments)`, whose arrays may be lazy: only shapes and dtypes are looked at.

    Args:
        function: from arrays to a list of arrays. Arrays that it takes from elsewhere must have values.
        arguments: examples of its arguments.

    Raises:
        ValueError: the function uses an operation that MLX cannot export.
    """
    stand_ins = StandIns()

    def with_backward_passes(*arrays: mx.array) -> list[mx.array]:
        with mock.patch.multiple(mx, **stand_ins.functions):
            results = function(*arrays)
        # These first: a marker's own operation is then listed before its gradient.
        return [*stand_ins.kept, *results]

    graph = exported(with_backward_passes, arguments)
    num_kept = len(stand_ins.kept)
    return _Splice(graph, stand_ins.calls, graph.outputs[:num_kept]).graph(graph.outputs[num_kept:])


class _Splice:
    """Puts the backward passes of the calls where the markers say."""

    def __init__(self, graph: Graph, calls: list[Call], gradients: Sequence[str]) -> None:
        self.operations = list(graph.operations)
        self.inputs = graph.inputs
        self.gradients = gradients
        self.readers: dict[str, list[int]] = {}
        self.maker: dict[str, int] = {}
        self.markers: dict[int, list[int]] = {}
        for index, operation in enumerate(self.operations):
            for name in operation.inputs:
                self.readers.setdefault(name, []).append(index)
            self.maker |= dict.fromkeys(operation.outputs, index)
            if operation.code:
                self.markers.setdefault(operation.code, []).append(index)
        self.renamed: dict[str, str] = {}
        for call in calls:
            self._splice(call)

    def graph(self, outputs: Sequence[str]) -> Graph:
        """The whole graph, reduced to what the results need."""
        outputs = tuple(self._final(name) for name in outputs)
        needed, pending = set(), list(outputs)
        while pending:
            index = self.maker.get(pending.pop())
            if index is None or index in needed:
                continue
            needed.add(index)
            operation = self.operations[index]
            inputs = tuple(self._final(name) for name in operation.inputs)
            self.operations[index] = replace(operation, inputs=inputs)
            pending.extend(inputs)
        return Graph(tuple(self.operations[i] for i in sorted(needed)), self.inputs, outputs)

    def _splice(self, call: Call) -> None:
        forward, results, values = [], [], []
        for code, cotangent_code, shape in call.results:
            marker, *backward = self.markers[code]
            made_up = self._spread(self.markers[cotangent_code][0], shape)
            if backward and made_up:
                self.renamed[made_up] = self._array_before(backward[0], shape)
            # Absent where nothing reads the result itself.
            if added := self._follow(marker, "Add", shape):
                index, before = added
                forward.append(index)
                results.append(self.operations[index])
                values.append(next(name for name in results[-1].inputs if name != before))
        arguments = [self._array_before(self.markers[code][0], shape) for code, shape, _ in call.arguments]
        self._pass_through(forward, results, (*arguments, *values))
        for code, shape, gradient in call.arguments:
            _, *backward = self.markers[code]
            spread = self._spread(backward[0], shape) if backward else None
            if spread and gradient is not None:
                self.renamed[spread] = self.gradients[gradient]

    def _pass_through(self, indices: list[int], results: list[Operation], inputs: tuple[str, ...]) -> None:
        """One operation, as in MLX, that reads arguments and the function's own results and hands these on.

        It takes the place of the additions of markers, which were only there to tell the gradients.
        """
        if not results:
            return
        joint = Operation(
            "CustomTransforms",
            inputs,
            tuple(op.outputs[0] for op in results),
            tuple(op.shapes[0] for op in results),
            tuple(op.num_bytes[0] for op in results),
        )
        for index in indices:
            self.operations[index] = joint
        self.maker |= dict.fromkeys(joint.outputs, indices[0])

    def _spread(self, marker: int, shape: tuple[int, ...]) -> str | None:
        """The array of that shape over which a marker's number is spread, if anything reads it."""
        found = self._follow(marker, "Broadcast" if shape else "Squeeze", shape)
        return found and self.operations[found[0]].outputs[0]

    def _follow(self, index: int, name: str, shape: tuple[int, ...]) -> tuple[int, str] | None:
        """The first operation of that name and shape after a marker, and the array that led there."""
        while True:
            array = self.operations[index].outputs[0]
            if array not in self.readers:
                return None
            # All that belongs to a marker has one reader.
            index = self.readers[array][0]
            operation = self.operations[index]
            if operation.name == name and operation.shapes[0] == shape:
                return index, array
            if operation.name not in _MARKER_STEPS:
                return None

    def _array_before(self, index: int, shape: tuple[int, ...]) -> str:
        """The array of that shape from which a marker's number was summed."""
        name = self.operations[index].inputs[0]
        while name in self.maker:
            maker = self.operations[self.maker[name]]
            if maker.shapes[maker.outputs.index(name)] == shape:
                return name
            name = maker.inputs[0]
        return name

    def _final(self, name: str) -> str:
        while name in self.renamed:
            name = self.renamed[name]
        return name
