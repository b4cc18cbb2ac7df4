"""Global gradient norm and clipping over any mesh.

A gradient that is split over a group contributes its pieces from every rank of that group; a replicated one
is counted once. The split is read from the records that the wrappers left on the modules (`parallel.layout`).
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

import comm
from comm.typed import named_arrays
from parallel.layout import model_layout
from parallel.wrapper import parallel_state


def global_norm(grads: Any, model: nn.Module) -> mx.array:
    """The L2 norm of the gradients of the whole (unsharded) model, a float32 scalar, equal on all ranks.

    Args:
        grads: Gradient tree of `model.trainable_parameters()`, already reduced over data-parallel ranks.
        model: The (wrapped) model; its parameter layout says what is split over which groups.
    """
    layout = model_layout(model)
    state = parallel_state(model)
    partial: dict[tuple[str, ...], mx.array] = {}
    groups: dict[str, comm.Group] = {}
    for name, grad in named_arrays(grads):
        if name in state.repeated:
            continue
        split = layout.get(name)
        square = grad.astype(mx.float32).square().sum() if split is None else split.squared_sum(grad)
        if split is not None:
            groups |= split.groups
        axes = tuple(sorted(split.groups)) if split else ()
        partial[axes] = partial[axes] + square if axes in partial else square
    total = mx.array(0.0, dtype=mx.float32)
    # Sorted, so that every rank issues the same collectives in the same order.
    for axes in sorted(partial):
        for axis in axes:
            partial[axes] = groups[axis].all_sum(partial[axes])
        total = total + partial[axes]
    # Stages may differ in what is split, so each adds up its own first.
    if "pp" in state.groups:
        total = state.groups["pp"].all_sum(total)
    return mx.sqrt(total)


def clip_grad_norm(grads: Any, max_norm: float | None, model: nn.Module) -> tuple[Any, mx.array]:
    """Scale `grads` so that their global norm is at most `max_norm`.

    Args:
        grads: The gradient tree, as for `global_norm`.
        max_norm: Largest norm allowed; `None` measures without clipping.
        model: The (wrapped) model.

    Returns:
        The clipped tree and the norm before clipping (float32 scalar), as `torch.nn.utils.clip_grad_norm_`.
    """
    norm = global_norm(grads, model)
    if max_norm is None:
        return grads, norm
    scale = mx.minimum(max_norm / (norm + 1e-6), 1.0)
    return tree_map(lambda g: g * scale.astype(g.dtype), grads), norm
