"""The local part of a training step as one compiled function: forward and backward pass of one micro-batch.

MLX traces a compiled function once per shape of its inputs and keeps every trace, so a run should bring few shapes.
All arrays of the model are inputs, frozen ones too: an array that a trace captured would stay in it, old and in
memory, after the model has got another one.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from comm.typed import named_arrays
from parallel.swapping import slots_of, swapped


def compiled(model: nn.Module, loss_and_grad: Callable[[nn.Module, Any], Any]) -> Callable[[nn.Module, Any], Any]:
    """`loss_and_grad(model, batch)`, compiled.

    Args:
        model: The one that the result is called with. What is not an array (training mode, which parameters are
            frozen) is taken as it is when a shape is traced.
        loss_and_grad: Returns a tree of arrays. It cannot read an array's values and leaves no array behind that
            it made.

    Returns:
        A function of (model, batch); a batch may hold Python numbers, each of which makes a trace of its own.
    """

    def traced(parameters: Any, batch: Any) -> Any:
        named = named_arrays(parameters)
        with swapped(slots_of(model, [name for name, _ in named]), [array for _, array in named]):
            return loss_and_grad(model, batch)

    function = mx.compile(traced)
    return lambda _, batch: function(model.parameters(), batch)
