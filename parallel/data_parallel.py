"""DataParallel: every rank holds the whole model and computes its share of the batch.

Gradients are summed over the ranks by `parallel.value_and_grad`, which divides once by the token count of
all ranks; `nn.value_and_grad` on a wrapped model would give this rank's gradients only, and is refused.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

import comm
from parallel.wrapper import Wrapper


class DataParallel(Wrapper):
    """Replicate `module` over `group`: `parallel.value_and_grad` sums gradients over its ranks.

    Trainable parameters are overwritten with rank 0's when the wrapper is built, so wrap after LoRA layers
    are in place. Frozen parameters are taken to be equal already (every rank loads the same files).

    Args:
        module: The model; the same object is returned.
        group: Ranks that share the batch. Default: the world of `comm.init()`.
        bucket_bytes: Size of one fused message. Default: chosen by `comm.GradientFusion`.
        wire_dtype: Dtype of gradients on the wire; `None` sends them as they are. Default: float32.

    Source: Li et al., PyTorch Distributed (arXiv 2006.15704).
    """

    def __init__(
        self,
        module: nn.Module,
        group: comm.Group | None = None,
        *,
        bucket_bytes: int | None = None,
        wire_dtype: mx.Dtype | None = mx.float32,
    ):
        group = self.join("dp_replicate", group)
        state = self.parallel_state
        if group.size > 1:
            weights = tree_map(group.broadcast, self.trainable_parameters())
            # Left lazy, they would be sent when a rank first needs them, which may be before or after other messages.
            mx.eval(weights)
            self.update(weights)
        state.loss_groups.append(group)
        fusion = comm.GradientFusion(group, bucket_bytes=bucket_bytes, wire_dtype=wire_dtype)
        state.fusions.append(fusion)
        state.reducers.append(fusion.all_sum)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the module itself; with several ranks, its gradient exists in `parallel.value_and_grad` only."""
        return self.parallel_state.guarded(super().__call__(*args, **kwargs))
