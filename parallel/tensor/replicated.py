"""Exact gradients for parameters that several ranks of a split region hold and use in different places.

Inside a region that is split over a group each rank sees only its part of such a parameter's gradient: query
and key norms, routers, the unsplit factor of a LoRA update, key heads that are held more than once. Here they
enter the region together, as activations do through `comm.copy_to_group`, and their gradients leave it summed
in one message of float32.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import mlx.core as mx
import mlx.nn as nn

import comm
from parallel.layout import Split, split_records
from parallel.swapping import swapped

Slot = tuple[nn.Module, str]


@contextmanager
def copied_to_group(slots: Sequence[Slot], group: comm.Group) -> Iterator[None]:
    """Within this context the arrays in `slots` are copies whose gradients are summed over the group.

    Args:
        slots: Pairs of module and name of one of its own arrays. Frozen ones are left alone.
        group: The ranks that hold them.
    """
    trained = [(module, name) for module, name in slots if name not in module._no_grad]
    if group.size == 1 or not trained:
        yield
        return
    originals = [module[name] for module, name in trained]
    splits = [_split_over(group, *slot) for slot in trained]
    with swapped(trained, _copy(originals, splits, group)):
        yield


def _split_over(group: comm.Group, module: nn.Module, name: str) -> Split | None:
    return next((split for split in split_records(module).get(name, ()) if split.group is group), None)


def _copy(arrays: list[mx.array], splits: list[Split | None], group: comm.Group) -> list[mx.array]:
    """Forward: the arrays unchanged. Backward: the cotangents of shared elements summed, in one message."""

    @mx.custom_function
    def copy(*arrays):
        return list(arrays)

    @copy.vjp
    def copy_vjp(arrays, cotangents, outputs):
        cotangents = cotangents if isinstance(cotangents, (list, tuple)) else [cotangents]
        parts = [_spread(c.astype(mx.float32), split) for c, split in zip(cotangents, splits)]
        shapes = [[piece.shape for piece in part] for part in parts]
        message = mx.concatenate([piece.reshape(-1) for part in parts for piece in part])
        summed = _cut(group.all_sum(message), shapes)
        return tuple(
            _collect(pieces, c.astype(mx.float32), split).astype(c.dtype)
            for pieces, c, split in zip(summed, cotangents, splits)
        )

    return cast("list[mx.array]", copy(*arrays))


def _cut(message: mx.array, shapes: list[list[tuple[int, ...]]]) -> list[list[mx.array]]:
    start = 0
    parts: list[list[mx.array]] = []
    for group in shapes:
        parts.append([])
        for shape in group:
            size = 1
            for n in shape:
                size *= n
            parts[-1].append(message[start : start + size].reshape(shape))
            start += size
    return parts


def _spread(gradient: mx.array, split: Split | None) -> list[mx.array]:
    """What is summed: the gradient, or of a split one the segments held more than once, zeros elsewhere."""
    if split is None:
        return [gradient]
    pieces = []
    for segment, piece in zip(split.segments, split.pieces(gradient)):
        if segment.copies > 1:
            size = piece.shape[split.dim]
            before = split.group.rank // segment.copies * size
            widths = [(0, 0)] * gradient.ndim
            widths[split.dim] = (before, segment.size - before - size)
            pieces.append(mx.pad(piece, widths))
    return pieces


def _collect(summed: list[mx.array], gradient: mx.array, split: Split | None) -> mx.array:
    """The way back from `_spread`; segments held once keep their own gradient."""
    if split is None:
        return summed[0]
    pieces, remaining = [], iter(summed)
    for segment, piece in zip(split.segments, split.pieces(gradient)):
        if segment.copies > 1:
            size = piece.shape[split.dim]
            before = split.group.rank // segment.copies * size
            piece = mx.split(next(remaining), [before, before + size], axis=split.dim)[1]
        pieces.append(piece)
    return mx.concatenate(pieces, axis=split.dim)
