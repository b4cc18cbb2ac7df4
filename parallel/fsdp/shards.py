"""Slices of many arrays to whole arrays and back, in one message per dtype.

The first dimension is divided; where the ranks do not divide it, slices are padded with zeros, which the whole
arrays lack. Nothing is cast on the way to whole arrays.
"""

from collections.abc import Mapping

import mlx.core as mx

import comm
from parallel.layout import Split

Arrays = dict[str, mx.array]


def joined(path: str, name: str) -> str:
    """A dotted path with one more name."""
    return f"{path}.{name}" if path else name


def gather_messages(local: Arrays, splits: Mapping[str, Split], group: comm.Group) -> tuple[list[mx.array], Arrays]:
    """Whole arrays from this rank's slices; lazy.

    Args:
        local: Name to slice.
        splits: Name to how it is divided.
        group: The ranks.

    Returns:
        The messages, one per dtype, `(ranks, numbers)`; and the whole arrays, made from them.
    """
    messages, whole = [], {}
    for names in _by_dtype(local).values():
        flat = mx.concatenate([local[name].reshape(-1) for name in names])
        message = group.all_gather(flat[None])
        messages.append(message)
        start = 0
        for name in names:
            slice_ = local[name]
            rows = message[:, start : start + slice_.size].reshape(-1, *slice_.shape[1:])
            whole[name] = rows[: splits[name].full_size]
            start += slice_.size
    return messages, whole


def gathered_with_gradient(
    local: Arrays, splits: Mapping[str, Split], group: comm.Group, wire_dtype: mx.Dtype | None
) -> tuple[Arrays, list[mx.array]]:
    """Whole arrays whose gradients are summed over the ranks, of which each rank gets its slice.

    Forward: as `gather_messages`. Backward: one sum-and-scatter per dtype on the wire.

    Returns:
        The whole arrays and the messages.
    """
    if not local:
        return {}, []
    names, messages = list(local), []

    @mx.custom_function
    def gather(*slices: mx.array) -> list[mx.array]:
        made, whole = gather_messages(dict(zip(names, slices)), splits, group)
        messages.extend(made)
        return [whole[name] for name in names]

    @gather.vjp
    def gather_vjp(primals, cotangents, outputs):
        cotangents = cotangents if isinstance(cotangents, (list, tuple)) else [cotangents]
        wires = {n: c.astype(_wire(c.dtype, wire_dtype)) for n, c in zip(names, cotangents)}
        summed = _scatter(wires, splits, group)
        return tuple(summed[n].astype(c.dtype) for n, c in zip(names, cotangents))

    whole = gather(*local.values())
    whole = whole if isinstance(whole, (list, tuple)) else [whole]
    return dict(zip(names, whole)), messages


def _scatter(whole: Arrays, splits: Mapping[str, Split], group: comm.Group) -> Arrays:
    """This rank's slices of the sums of the ranks' whole arrays."""
    result = {}
    for names in _by_dtype(whole).values():
        parts = [_padded(whole[name], splits[name], group.size).reshape(group.size, -1) for name in names]
        message = group.reduce_scatter(mx.concatenate(parts, axis=1))
        start = 0
        for name, part in zip(names, parts):
            shape = (splits[name].local_size, *whole[name].shape[1:])
            result[name] = message[0, start : start + part.shape[1]].reshape(shape)
            start += part.shape[1]
    return result


def _padded(whole: mx.array, split: Split, ranks: int) -> mx.array:
    more = split.local_size * ranks - whole.shape[0]
    return mx.pad(whole, [(0, more), *[(0, 0)] * (whole.ndim - 1)]) if more else whole


def _by_dtype(arrays: Arrays) -> dict[mx.Dtype, list[str]]:
    names: dict[mx.Dtype, list[str]] = {}
    for name, array in arrays.items():
        names.setdefault(array.dtype, []).append(name)
    return names


def _wire(dtype: mx.Dtype, wire_dtype: mx.Dtype | None) -> mx.Dtype:
    return dtype if wire_dtype is None else wire_dtype
