"""The same model in float64, to tell rounding from errors.

Where a model's gradients change by more than a test's bound when its float32 weights change in their last place, no
float32 computation is that exact; two of them are then compared by their distances from float64.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from trainer.layers.causal_conv import causal_conv


@contextmanager
def in_float64(model: nn.Module) -> Iterator[nn.Module]:
    """Turns the parameters and, meanwhile, every cast to float32 into float64, on MLX's CPU device.

    MLX has no float64 convolution and no float64 product with gathered experts: here they are sums of products.
    """
    float32, convolve, gather_mm = mx.float32, nn.Conv1d.__call__, mx.gather_mm
    model.update(tree_map(lambda x: x.astype(mx.float64) if x.dtype == float32 else x, model.parameters()))
    nn.Conv1d.__call__ = lambda layer, x: causal_conv(x, layer.weight, layer.get("bias"))
    mx.gather_mm = lambda x, weight, rhs_indices, **_: x @ weight[rhs_indices]
    mx.float32 = mx.float64
    try:
        with mx.stream(mx.cpu):
            yield model
    finally:
        mx.float32, nn.Conv1d.__call__, mx.gather_mm = float32, convolve, gather_mm
