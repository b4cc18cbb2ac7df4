"""Slices of a layer's arrays, and the copies, classes and dropout masks that go with them.

What `linear.py` and `vocab.py` are made of; nothing here communicates.
"""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

import comm
from parallel.layout import Segment, Split, record_split, split_records


class SlicedModule(nn.Module):
    """A module with this rank's slices of its arrays that prints the dimensions of the whole; mixed into its class."""

    def _extra_repr(self) -> str:
        return self.whole_repr


def remember_whole(module: nn.Module, group: comm.Group) -> None:
    """Keep what `module` prints of itself, before its arrays are sliced."""
    module.whole_repr = ", ".join(part for part in (module._extra_repr(), f"ranks={group.size}") if part)


def slice_array(
    module: nn.Module, name: str, dim: int, segments: tuple[Segment, ...], group: comm.Group, axis: str = "tp"
) -> None:
    """Replace the module's own array `name` by this rank's slice along `dim` and record that.

    Args:
        segments: The parts of the dimension, in units of the layer's features; scaled to the array (packed weights, scales).

    Raises:
        ValueError: The group's size does not divide a segment.
    """
    array, full = module[name], sum(segment.size for segment in segments)
    scaled = tuple(Segment(s.size * array.shape[dim] // full, s.copies) for s in segments)
    if sum(s.size for s in scaled) != array.shape[dim] or any(s.size * s.copies % group.size for s in scaled):
        sizes = [segment.size for segment in segments]
        raise ValueError(
            f"{name} {array.shape} cannot be divided along dimension {dim}, in segments of {sizes}, "
            f"over {group.size} ranks: each segment must be divisible by {group.size}."
        )
    split = Split(axis, group, dim, scaled)
    module[name] = split.slice(array)
    record_split(module, name, split)


def as_segments(segments: int | Sequence[int | float] | Sequence[Segment], size: int) -> tuple[Segment, ...]:
    """`Segment`s of a dimension of `size` from MLX's ways to say them."""
    if isinstance(segments, int):
        bounds = [size * i // segments for i in range(1, segments)]
    else:
        given = tuple(segment for segment in segments if isinstance(segment, Segment))
        if given:
            return given
        bounds = [int(s * size) if isinstance(s, float) else s for s in segments if not isinstance(s, Segment)]
    edges = [0, *bounds, size]
    return tuple(Segment(last - first) for first, last in zip(edges, edges[1:]))


def dense_weight(linear: nn.Module) -> mx.array:
    """The weight matrix, dequantized where it is packed."""
    if "scales" not in linear:
        return linear.weight
    return mx.dequantize(
        linear.weight,
        linear.scales,
        linear.get("biases"),
        group_size=linear.group_size,
        bits=linear.bits,
        mode=linear.mode,
    )


def without_bias(layer: nn.Module) -> nn.Module:
    """`layer` itself, or a shallow copy without its bias (or that of the linear inside an adapter layer)."""
    if "bias" in layer.get("linear", {}):
        copy = _shallow_copy(layer)
        copy["linear"] = without_bias(layer.linear)
        return copy
    if "bias" not in layer:
        return layer
    copy = _shallow_copy(layer)
    del copy["bias"]
    return copy


def _shallow_copy(module: nn.Module) -> nn.Module:
    copy = type(module).__new__(type(module))
    dict.update(copy, module)
    copy.__dict__.update(module.__dict__)
    return copy


def copy_tree(module: nn.Module) -> nn.Module:
    """A copy of a module tree that shares only the arrays."""
    copy = _shallow_copy(module)
    copy._no_grad = set(module._no_grad)
    copy.__dict__.pop("_splits", None)
    for name, splits in split_records(module).items():
        for split in splits:
            record_split(copy, name, split)
    for name, value in module.items():
        if isinstance(value, nn.Module):
            copy[name] = copy_tree(value)
    return copy


class SlicedDropout(nn.Module):
    """Dropout of an input that is split over the group: this rank's slice of the whole input's mask.

    Args:
        dropout: A layer whose mask depends on the input's shape only.
        split: How the input's last dimension is divided.
    """

    def __init__(self, dropout: nn.Module, split: Split):
        super().__init__()
        self.dropout = dropout
        self.split = split

    def __call__(self, x: mx.array) -> mx.array:
        """Drop elements of this rank's slice `x` `(..., local)`."""
        ones = mx.ones((*x.shape[:-1], self.split.full_size), dtype=x.dtype)
        factors = self.dropout(ones)
        if factors is ones:
            return x
        last = Split(self.split.axis, self.split.group, x.ndim - 1, self.split.segments)
        return x * mx.stop_gradient(last.slice(factors))
