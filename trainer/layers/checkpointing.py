"""Gradient checkpointing of decoder layers: keep a layer's input, compute its inside again in the backward pass.

Exact as long as the layer is a function of its arguments, its parameters and what the caller fixed for the batch
(masks, segments, keyed dropout): MLX's own `nn.Dropout` would draw another mask the second time (arXiv
1604.06174). Every array argument gets its gradient, also inside tuples, lists and dicts; arrays that hang on other
objects are constants.
"""

from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

import comm
from parallel import overridden_class, slots_of, swapped


def checkpoint_layers(layers: list[nn.Module], every: bool | int = True) -> None:
    """Extend the classes of `layers` in place, so that the inside of each, or of every k-th, is computed again in
    the backward pass.

    Args:
        layers: A model's decoder layers, with adapters and wrappers in place.
        every: True or 1 for all layers, k for the k-th, 2k-th, ...; False for none.

    Raises:
        ValueError: `every` is a negative number, or a layer draws dropout masks that a second pass would not see.
            A layer that changes an object passed to it raises it when it is first called.
    """
    step = int(every)
    if step < 0:
        raise ValueError(f"gradient_checkpointing is {every}; it must be true, false or a positive number of layers.")
    for layer in layers[step - 1 :: step] if step else []:
        for module in layer.modules():
            if type(module) in (nn.Dropout, nn.Dropout2d, nn.Dropout3d) and module._p_1 < 1.0:
                raise ValueError(f"gradient checkpointing needs dropout with keys; this layer has {module}.")
        layer.__class__ = _checkpointed(type(layer))


@cache
def _checkpointed(cls: type) -> type:
    def call(self, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return cls.__call__(self, *args, **kwargs)
        parameters = comm.named_arrays(self.trainable_parameters())
        names = [name for name, _ in parameters]
        given = [leaf for _, leaf in comm.named_arrays((args, kwargs)) if isinstance(leaf, mx.array)]

        def inside(weights: list[mx.array], given: list[mx.array]) -> Any:
            left = iter(given)
            seen = tree_map(lambda leaf: next(left) if isinstance(leaf, mx.array) else leaf, (args, kwargs))
            before = _held(seen)
            # The arrays seen here belong to one trace; left in place they would keep its whole graph.
            with swapped(slots_of(self, names), weights):
                outputs = cls.__call__(self, *seen[0], **seen[1])
            if _held(seen) != before:
                raise ValueError(
                    f"gradient_checkpointing: {cls.__module__}.{cls.__name__} changes an object that is passed to it, "
                    "which a second pass would change again; train this model with gradient_checkpointing=false."
                )
            return outputs

        return mx.checkpoint(inside)([array for _, array in parameters], given)

    return overridden_class(cls, {"__call__": call})


def _held(value: Any, seen: tuple[int, ...] = ()) -> Any:
    """Identities of what `value` and the objects in it hold, by which a change of any of them shows."""
    if isinstance(value, (mx.array, nn.Module)) or id(value) in seen:
        return id(value)
    seen += (id(value),)
    if isinstance(value, dict):
        return [(key, _held(item, seen)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [_held(item, seen) for item in value]
    return id(value), _held(getattr(value, "__dict__", ()), seen)
