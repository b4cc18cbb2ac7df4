"""The operations of a computation with the shapes of all arrays, as MLX tells them; nothing is evaluated.

MLX cannot tell those of functions with a hand-written gradient; `trainer.memory.traced_graph` can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import mlx.core as mx


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


def exported(function: Callable[..., list[mx.array]], arguments: Sequence[mx.array]) -> Graph:
    """The graph of `function(*arguments)`.

    Raises:
        ValueError: the function uses an operation that MLX cannot export.
    """
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
