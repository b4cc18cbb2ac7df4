"""What MLX's annotations leave open, said once: trees have named arrays, and what is made of arrays is one."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

import mlx.core as mx
from mlx.utils import tree_flatten

Result = TypeVar("Result", covariant=True)


class CustomFunction(Protocol[Result]):
    """A function of arrays with a gradient of its own."""

    def __call__(self, *arrays: mx.array) -> Result: ...

    def vjp(self, rule: Callable[..., Any]) -> Any: ...


def custom_function(function: Callable[..., Result]) -> CustomFunction[Result]:
    """`mx.custom_function`, whose result is annotated as any object."""
    return cast("CustomFunction[Result]", mx.custom_function(function))


def named_arrays(tree: Any) -> list[tuple[str, mx.array]]:
    """The arrays of a tree by their dotted names, in its order."""
    return cast("list[tuple[str, mx.array]]", tree_flatten(tree))


def number(array: mx.array) -> float:
    """The value of a scalar array that is no complex number."""
    return cast(float, array.item())


def integers(array: mx.array) -> list[Any]:
    """The values of an integer array `(N,)`, or its rows `(N, ...)` as nested lists."""
    return cast("list[Any]", array.tolist())
