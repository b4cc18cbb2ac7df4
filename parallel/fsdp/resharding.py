"""Linear layers that ask for their weights twice: once per pass, with nothing kept in between.

MLX's own gradient of `x @ w.T` refers to `w`, so a gathered weight would live until the backward pass. Here the
layer's call is one function with a gradient of its own, which runs the layer's gradient on weights that are
gathered again. For layers that are linear in `x` no forward result is needed, so nothing is computed twice.
"""

from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from parallel.extension import extended_class
from parallel.swapping import slots_of, swapped


class ReshardedLeaf(nn.Module):
    """A linear layer (plain, quantized, of experts, or a convolution); mixed in below what tensor parallelism adds.

    `whole_again` is a function that gives its whole arrays by name in the backward pass, or None.
    """

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """As the layer that it was."""
        again = self.whole_again
        call = super().__call__
        if again is None:
            return call(x, *args, **kwargs)
        trained = [n for n, value in self.items() if isinstance(value, mx.array) and n not in self._no_grad]

        def run(x: mx.array, *arrays: mx.array) -> mx.array:
            with swapped(slots_of(self, trained), arrays):
                return call(x, *args, **kwargs)

        @mx.custom_function
        def forward(x: mx.array, *arrays: mx.array) -> mx.array:
            return run(x, *arrays)

        @forward.vjp
        def backward(primals, cotangent, output):
            # Tensor parallelism may call a copy of the layer without its bias.
            whole = {name: value for name, value in again().items() if name in self}
            x = primals[0] if isinstance(primals, (list, tuple)) else primals
            # An array that is not divided keeps the value of the first pass.
            arrays = [whole.get(name, value) for name, value in zip(trained, primals[1:] if trained else [])]
            with swapped(slots_of(self, whole), whole.values()):
                _, grads = mx.vjp(lambda *primals: [run(*primals)], [x, *arrays], [cotangent])
            return tuple(grads) if trained else grads[0]

        return forward(x, *[self[name] for name in trained])


@cache
def resharded_class(cls: type) -> type:
    """`cls` with `ReshardedLeaf` in front of the layer's own class, behind the mixins of tensor parallelism."""
    if base := vars(cls).get("extended_from"):
        return extended_class(vars(cls)["extended_by"], resharded_class(base), cls.__name__)
    return extended_class(ReshardedLeaf, cls, cls.__name__)
