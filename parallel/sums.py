"""Sums over micro-batches, or over slices of one: trees of arrays, in float32."""

from typing import Any

import mlx.core as mx
from mlx.utils import tree_map


def add_sums(total: Any, current: Any) -> Any:
    """A tree of sums, in float32, with one more added; `total` is None for the first."""
    if total is None:
        return tree_map(_widen, current)
    return tree_map(lambda a, b: a + b.astype(a.dtype), total, current)


def _widen(x: mx.array) -> mx.array:
    return x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x
