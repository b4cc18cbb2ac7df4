"""What takes the place of functions with a hand-written gradient while a computation is traced.

MLX cannot tell the operations of `mx.custom_function`, nor of `mx.checkpoint`, which is one. A stand-in runs
the forward pass as it is, traces the backward pass right away for a made-up cotangent, and leaves markers from
which `trainer.memory.traced_graph` finds the place of both in the whole graph.

A marker is a Hadamard transform of a number whose scale is a unique code: no model uses one, it can be
exported, and its gradient is again a Hadamard transform with that scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten


@dataclass
class Call:
    """One call of a function with a hand-written gradient.

    Attributes:
        arguments: code of each differentiable argument's marker, its shape, and the position of its gradient
            among the arrays that were kept (None: it has none).
        results: code of each differentiable result's marker, code of its made-up cotangent, and its shape.
    """

    arguments: list[tuple[int, tuple[int, ...], int | None]]
    results: list[tuple[int, int, tuple[int, ...]]]


class StandIns:
    """Replacements of `mx.custom_function` and `mx.checkpoint`, and what they were called with."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
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

    def __init__(self, stand_ins: StandIns, function: Callable) -> None:
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
        call, number = Call([], []), mx.array(0.0)
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


def _contiguous(array: mx.array, *_: Any, **__: Any) -> mx.array:
    """Stands in for `mx.contiguous`, which cannot be exported: flattening copies when rows are out of order."""
    return array.reshape(-1).reshape(array.shape)


def _is_float(array: mx.array) -> bool:
    return mx.issubdtype(array.dtype, mx.floating)
