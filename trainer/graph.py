"""The graph of a computation with the shapes of all arrays, without evaluating anything.

MLX can tell the operations of a traced function, but not of functions with a hand-written gradient
(`mx.custom_function`, and `mx.checkpoint`, which is one). While tracing, these are replaced by stand-ins:
the forward pass as it is, the backward pass traced right away for a made-up cotangent, and markers from
which the place of both in the whole graph is found afterwards.

A marker is a Hadamard transform of a number whose scale is a unique code: no model uses one, it can be
exported, and its gradient is again a Hadamard transform with that scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any
from unittest import mock

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten


# Between a marker and the array that it stands for.
_MARKER_STEPS = ("Reduce", "Squeeze", "ExpandDims", "Broadcast", "AsType", "Reshape")


@dataclass(frozen=True)
class Operation:
    """One operation.

    Attributes:
        name: of MLX's primitive.
        inputs, outputs: names of the arrays that it reads and makes.
        shapes, num_bytes: of the arrays that it makes.
        code: of a marker, else 0.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    num_bytes: tuple[int, ...]
    code: int = 0


@dataclass(frozen=True)
class Graph:
    """A traced function.

    Attributes:
        operations: those that the results need, in no particular order.
        inputs: names of the function's arguments.
        outputs: names of its results.
    """

    operations: tuple[Operation, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def trace(function: Callable[..., list[mx.array]], arguments: Sequence[mx.array]) -> Graph:
    """The graph of `function(*arguments)`, whose arrays may be lazy: only shapes and dtypes are looked at.

    Args:
        function: from arrays to a list of arrays. Arrays that it takes from elsewhere must have values.
        arguments: examples of its arguments.

    Raises:
        ValueError: the function uses an operation that MLX cannot export.
    """
    stand_ins = _StandIns()

    def with_backward_passes(*arrays: mx.array) -> list[mx.array]:
        with mock.patch.multiple(mx, **stand_ins.functions):
            results = function(*arrays)
        # These first: a marker's own operation is then listed before its gradient.
        return [*stand_ins.kept, *results]

    graph = _export(with_backward_passes, arguments)
    num_kept = len(stand_ins.kept)
    return _Splice(graph, stand_ins.calls, graph.outputs[:num_kept]).graph(graph.outputs[num_kept:])


def _export(function: Callable[..., list[mx.array]], arguments: Sequence[mx.array]) -> Graph:
    parts: dict[str, Any] = {}
    operations: list[Operation] = []

    def receive(part: dict[str, Any]) -> None:
        if part["type"] != "primitive":
            parts[part["type"]] = part
            return
        outputs = part["outputs"]
        operations.append(
            Operation(
                part["name"],
                tuple(name for name, _, _ in part["inputs"]),
                tuple(name for name, _, _ in outputs),
                tuple(tuple(shape) for _, shape, _ in outputs),
                tuple(prod(shape) * dtype.size for _, shape, dtype in outputs),
                round(part["arguments"][0]) if part["name"] == "Hadamard" else 0,
            )
        )

    mx.export_function(receive, function, *arguments)
    inputs, outputs = (tuple(entry[0] for entry in parts[kind][kind]) for kind in ("inputs", "outputs"))
    return Graph(tuple(operations), inputs, outputs)


@dataclass
class _Call:
    """One call of a function with a hand-written gradient.

    Attributes:
        arguments: code of each differentiable argument's marker, its shape, and the position of its gradient
            among the arrays that were kept (None: it has none).
        results: code of each differentiable result's marker, code of its made-up cotangent, and its shape.
    """

    arguments: list[tuple[int, tuple[int, ...], int | None]]
    results: list[tuple[int, int, tuple[int, ...]]]


class _StandIns:
    """Replacements of `mx.custom_function` and `mx.checkpoint`, and what they were called with."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self.kept: list[mx.array] = []
        self.num_codes = 0

    @property
    def functions(self) -> dict[str, Callable]:
        """Name in `mlx.core` to what takes its place."""
        return {
            "custom_function": self.custom_function,
            "checkpoint": self.checkpoint,
            "contiguous": _contiguous,
        }

    def custom_function(self, function: Callable) -> _CustomFunction:
        """Stands in for `mx.custom_function`."""
        return _CustomFunction(self, function)

    def checkpoint(self, function: Callable) -> Callable:
        """Stands in for `mx.checkpoint`: the backward pass computes the function again, after the forward pass."""

        def backward(primals: Any, cotangents: Any, outputs: Any) -> Any:
            primals = primals if len(paths) > 1 else (primals,)
            ready = mx.depends(list(primals), [array for _, array in tree_flatten(outputs)])

            def flat(*arrays: mx.array) -> list[mx.array]:
                args = tree_unflatten(list(zip(paths, arrays, strict=True)))
                return [array for _, array in tree_flatten(function(*args))]

            return mx.vjp(flat, ready, [c for _, c in tree_flatten(cotangents)])[1]

        paths: list[str] = []

        def call(*args: Any) -> Any:
            arrays = tree_flatten(list(args))
            paths[:] = [path for path, _ in arrays]
            run = _CustomFunction(
                self, lambda *flat: function(*tree_unflatten(list(zip(paths, flat, strict=True))))
            )
            run.vjp(backward)
            return run(*(array for _, array in arrays))

        return call

    def marked(self, number: mx.array) -> tuple[mx.array, int]:
        """A float32 number that went through a marker, and the marker's code."""
        self.num_codes += 1
        pair = mx.broadcast_to(number, (2,))
        marked = mx.hadamard_transform(pair, scale=float(self.num_codes)).sum()
        self.keep(marked)
        return marked, self.num_codes

    def keep(self, array: mx.array) -> int:
        """Make an array a result of the traced function, whatever else it is needed for; returns its position."""
        self.kept.append(mx.stop_gradient(array))
        return len(self.kept) - 1


class _CustomFunction:
    """Stands in for one `mx.custom_function`; used like it."""

    def __init__(self, stand_ins: _StandIns, function: Callable) -> None:
        self.stand_ins = stand_ins
        self.function = function
        self.backward: Callable | None = None

    def vjp(self, backward: Callable) -> _CustomFunction:
        self.backward = backward
        return self

    def __call__(self, *args: mx.array) -> Any:
        assert self.backward is not None, "a custom function without a gradient cannot be traced"
        outputs = self.function(*(mx.stop_gradient(arg) for arg in args))
        flat = [mx.stop_gradient(array) for _, array in tree_flatten(outputs)]
        paths = [path for path, _ in tree_flatten(outputs)]
        made_up, cotangent_codes = zip(*(self._cotangent(array) for array in flat), strict=True)

        def like_outputs(arrays: Iterable[mx.array]) -> Any:
            if isinstance(outputs, mx.array):
                return next(iter(arrays))
            return tree_unflatten(list(zip(paths, arrays, strict=True)))

        primals = tuple(mx.stop_gradient(arg) for arg in args)
        gradients = self.backward(
            primals[0] if len(args) == 1 else primals, like_outputs(made_up), like_outputs(flat)
        )
        gradients = [gradients] if isinstance(gradients, mx.array) else list(gradients)
        call, number = _Call([], []), mx.array(0.0)
        for arg, gradient in zip(args, gradients, strict=False):
            if _is_float(arg) and arg.ndim:
                marked, code = self.stand_ins.marked(arg.sum().astype(mx.float32))
                number = number + marked
                position = None if gradient is None else self.stand_ins.keep(gradient)
                call.arguments.append((code, tuple(arg.shape), position))
        results = []
        for array, cotangent_code in zip(flat, cotangent_codes, strict=True):
            if _is_float(array):
                marked, code = self.stand_ins.marked(number)
                call.results.append((code, cotangent_code, tuple(array.shape)))
                array = array + marked.astype(array.dtype)
            results.append(array)
        self.stand_ins.calls.append(call)
        return like_outputs(results)

    def _cotangent(self, array: mx.array) -> tuple[mx.array, int]:
        """A made-up cotangent that needs no memory, and its code."""
        marked, code = self.stand_ins.marked(mx.array(0.0))
        return mx.stop_gradient(mx.broadcast_to(marked.astype(array.dtype), array.shape)), code


class _Splice:
    """Puts the backward passes of the calls where the markers say."""

    def __init__(self, graph: Graph, calls: list[_Call], gradients: Sequence[str]) -> None:
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

    def _splice(self, call: _Call) -> None:
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


def _contiguous(array: mx.array, *_: Any, **__: Any) -> mx.array:
    """Stands in for `mx.contiguous`, which cannot be exported: flattening copies when rows are out of order."""
    return array.reshape(-1).reshape(array.shape)


def _is_float(array: mx.array) -> bool:
    return mx.issubdtype(array.dtype, mx.floating)
