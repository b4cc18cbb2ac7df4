"""The whole graph of a computation with the shapes of all arrays, hand-written gradients included; nothing is evaluated.

MLX tells the operations of a function by `mx.export_function`, all but two: the one that `mx.custom_function` and
`mx.checkpoint` leave behind, and `mx.contiguous`. (`mx.export_to_dot` knows these too, but no shapes.) While a
function is traced, stand-ins take the place of the three in `mlx.core`, where mlx-lm's own code finds them as well.

The stand-in of a hand-written gradient runs the forward pass, and the backward pass right away for made-up
cotangents. For MLX to differentiate through it, it links results to arguments by products with marks, arrays that
nothing else reads: `result + mark * sum(argument * mark')`. The gradient of such a product is a product with the same
mark, which shows where the true cotangents come from and where the gradients are read; there both passes are
joined. Arrays are found by making them results of the traced function.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import prod
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_unflatten

import comm


@dataclass(frozen=True)
class Operation:
    """One operation.

    Attributes:
        name: The name of MLX's primitive.
        inputs, outputs: Names of the arrays that it reads and makes.
        shapes, num_bytes: Shape and size of each array that it makes.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    num_bytes: tuple[int, ...]


@dataclass(frozen=True)
class Graph:
    """A traced function.

    Attributes:
        operations: Those that the results need, in no particular order.
        inputs: Names of the function's arguments.
        outputs: Names of its results.
    """

    operations: tuple[Operation, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def trace(function: Callable[..., list[mx.array]], arguments: Sequence[mx.array]) -> Graph:
    """The graph of `function(*arguments)`, whose arrays may be lazy: only shapes and dtypes are looked at.

    Args:
        function: A function from arrays to a list of arrays. Arrays that it takes from elsewhere must have values.
        arguments: Examples of its arguments.

    Raises:
        ValueError: The function uses an operation that MLX cannot export.
    """
    calls: list[_Call] = []

    def with_calls(*arrays: mx.array) -> list[mx.array]:
        with _stand_ins(calls):
            results = function(*arrays)
        found = [array for arguments, values in calls for group in (*arguments, *values) for array in group]
        return [*found, *results]

    graph = _exported(with_calls, arguments)
    names = iter(graph.outputs)
    named = [
        ([_Argument(*islice(names, 3)) for _ in arguments], [_Result(*islice(names, 4)) for _ in values])
        for arguments, values in calls
    ]
    return _joined(graph, named, tuple(names))


class _Argument(NamedTuple):
    """A differentiable argument of a function with a hand-written gradient; arrays, or their names."""

    array: Any
    mark: Any
    gradient: Any


class _Result(NamedTuple):
    """A differentiable result: as computed, its mark and made-up cotangent, and as linked to the arguments."""

    value: Any
    mark: Any
    cotangent: Any
    linked: Any


_Call = tuple[list[_Argument], list[_Result]]


def _exported(function: Callable[..., list[mx.array]], arguments: Sequence[mx.array]) -> Graph:
    parts: dict[str, Any] = {}
    operations: list[Operation] = []

    def receive(part: dict[str, Any]) -> None:
        parts[part["type"]] = part
        if part["type"] == "primitive":
            inputs = tuple(name for name, _, _ in part["inputs"])
            names, shapes, dtypes = zip(*part["outputs"])
            num_bytes = tuple(prod(shape) * dtype.size for shape, dtype in zip(shapes, dtypes))
            operations.append(Operation(part["name"], inputs, names, shapes, num_bytes))

    mx.export_function(receive, function, *arguments)
    inputs, outputs = (tuple(entry[0] for entry in parts[kind][kind]) for kind in ("inputs", "outputs"))
    return Graph(tuple(operations), inputs, outputs)


def _joined(graph: Graph, calls: list[_Call], outputs: tuple[str, ...]) -> Graph:
    """The graph with the backward passes of the calls in their places, reduced to what `outputs` need."""
    maker = {name: op for op in graph.operations for name in op.outputs}
    readers: defaultdict[str, list[Operation]] = defaultdict(list)
    for op in graph.operations:
        for name in op.inputs:
            readers[name].append(op)
    renamed: dict[str, str] = {}
    for arguments, results in calls:
        for array, mark, gradient in arguments:
            renamed |= {op.outputs[0]: gradient for op in readers[mark] if array not in op.inputs}
        for _, mark, cotangent, linked in results:
            for op in readers[mark]:
                if op.outputs[0] not in maker[linked].inputs:
                    renamed[cotangent] = next(name for name in op.inputs if name != mark)
        # As in MLX, one operation reads arguments and the function's own results and hands these on.
        read = [result for result in results if readers[result.linked] or result.linked in outputs]
        inputs = (*(argument.array for argument in arguments), *(result.value for result in read))
        made = (maker[result.linked] for result in read)
        columns = ((op.outputs[0], op.shapes[0], op.num_bytes[0]) for op in made)
        if read:
            joint = Operation("CustomTransforms", inputs, *zip(*columns))
            maker |= dict.fromkeys(joint.outputs, joint)

    def final(names: Sequence[str]) -> tuple[str, ...]:
        return tuple(final([renamed[name]])[0] if name in renamed else name for name in names)

    needed: dict[tuple[str, ...], Operation] = {}
    pending = list(outputs := final(outputs))
    while pending:
        made_by = maker.get(pending.pop())
        if made_by is not None and made_by.outputs not in needed:
            needed[made_by.outputs] = replace(made_by, inputs=final(made_by.inputs))
            pending.extend(needed[made_by.outputs].inputs)
    return Graph(tuple(needed.values()), graph.inputs, outputs)


@contextlib.contextmanager
def _stand_ins(calls: list[_Call]) -> Iterator[None]:
    """Put stand-ins into `mlx.core` for a while; each call of a function with a gradient is added to `calls`."""
    stand_ins: dict[str, Callable[..., Any]] = {
        "custom_function": lambda function: _CustomFunction(function, calls),
        "checkpoint": lambda function: _checkpoint(function, calls),
        # Flattening copies when rows are out of order.
        "contiguous": lambda array, *_, **__: array.reshape(-1).reshape(array.shape),
    }
    originals = {name: getattr(mx, name) for name in stand_ins}
    try:
        for name, stand_in in stand_ins.items():
            setattr(mx, name, stand_in)
        yield
    finally:
        for name, original in originals.items():
            setattr(mx, name, original)


class _CustomFunction:
    """Stands in for one `mx.custom_function`; used like it."""

    def __init__(self, function: Callable, calls: list[_Call]) -> None:
        self.function = function
        self.calls = calls
        self.backward: Callable | None = None

    def vjp(self, backward: Callable) -> _CustomFunction:
        self.backward = backward
        return self

    def __call__(self, *args: mx.array) -> Any:
        assert self.backward is not None, "a custom function without a gradient cannot be traced"
        primals = tuple(map(mx.stop_gradient, args))
        outputs = self.function(*primals)
        paths, values = zip(*((path, mx.stop_gradient(array)) for path, array in comm.named_arrays(outputs)))

        def like_outputs(arrays: Sequence[mx.array]) -> Any:
            return arrays[0] if isinstance(outputs, mx.array) else tree_unflatten(list(zip(paths, arrays)))

        cotangents = [_mark(value) for value in values]
        given = primals[0] if len(args) == 1 else primals
        gradients = self.backward(given, like_outputs(cotangents), like_outputs(values))
        gradients = [gradients] if isinstance(gradients, mx.array) else gradients
        arguments = [_Argument(a, _mark(a), g) for a, g in zip(args, gradients) if _is_float(a)]
        total = sum(((array * mark).sum() for array, mark, _ in arguments), mx.array(0.0))
        results = []
        for value, cotangent in zip(values, cotangents):
            mark = _mark(value)
            linked = value + mark * mx.broadcast_to(total.astype(value.dtype), value.shape)
            results.append(_Result(value, mark, cotangent, linked))
        self.calls.append((arguments, [result for result in results if _is_float(result.value)]))
        return like_outputs([result.linked if _is_float(result.value) else result.value for result in results])


def _checkpoint(function: Callable, calls: list[_Call]) -> Callable:
    """Stands in for `mx.checkpoint`: the backward pass computes the function again, after the forward pass."""

    def call(*args: Any) -> Any:
        paths, arrays = zip(*comm.named_arrays(list(args)))

        def flat(*arrays: mx.array) -> Any:
            return function(*tree_unflatten(list(zip(paths, arrays))))

        def backward(primals: Any, cotangents: Any, outputs: Any) -> list[mx.array]:
            primals = primals if len(paths) > 1 else (primals,)
            ready = mx.depends(list(primals), [array for _, array in comm.named_arrays(outputs)])
            again = lambda *arrays: [array for _, array in comm.named_arrays(flat(*arrays))]  # noqa: E731
            return mx.vjp(again, ready, [array for _, array in comm.named_arrays(cotangents)])[1]

        return _CustomFunction(flat, calls).vjp(backward)(*arrays)

    return call


def _mark(like: mx.array) -> mx.array:
    """An array of that shape and dtype that equals no other one in the graph and needs no memory."""
    return mx.as_strided(mx.array([0.0]).astype(like.dtype), like.shape, [0] * like.ndim)


def _is_float(array: mx.array) -> bool:
    return mx.issubdtype(array.dtype, mx.floating)
