"""Fused sums of a gradient tree: few large messages that leave while the backward still runs.

Gradients are joined into buckets of one dtype, last layer first, because the backward pass
finishes them in that order. The buckets' all_sums are started one by one on the group's own stream
and go out while gradients of earlier layers are still computed; the host then waits for all of
them before any GPU work can depend on them (Metal ends GPU work that waits for some 5 s). Sums
only: the caller divides.
"""

import logging
import math
from collections.abc import Hashable, Sequence
from itertools import accumulate
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from comm.group import Group
from comm.link import measure_join, measure_link

_log = logging.getLogger(__name__)
_NARROW = (mx.float16, mx.bfloat16, mx.float32)


class GradientFusion:
    """Sums trees of gradients over a group.

    Args:
        group: The ranks whose gradients are added.
        bucket_bytes: Bytes of one message, counted in the wire dtype. Default: None = chosen at
            the first call from the connection's measured latency and bandwidth.
        wire_dtype: Dtype in which gradients travel and are added: `mx.float32` (no rounding at
            each hop), `mx.bfloat16`, `mx.float16`, or None = each array's own. Float32 gives
            float32 results, anything else each array's own dtype. Default: `mx.float32`.

    Raises:
        ValueError: `bucket_bytes` or `wire_dtype` is not one of these.
    """

    def __init__(
        self,
        group: Group,
        bucket_bytes: int | None = None,
        wire_dtype: mx.Dtype | None = mx.float32,
    ):
        if bucket_bytes is not None and bucket_bytes < 1:
            raise ValueError(f"bucket_bytes is {bucket_bytes}; it must be at least 1, or None.")
        if wire_dtype is not None and wire_dtype not in _NARROW:
            raise ValueError(
                f"wire_dtype is {wire_dtype}; allowed are float32, bfloat16, float16 and None."
            )
        self.group = group
        self.bucket_bytes = bucket_bytes
        self.wire_dtype = wire_dtype
        self.message_bytes = 0  # of the latest call, on this rank

    def all_sum(self, tree: Any) -> Any:
        """The tree with every array summed over the group, evaluated.

        Call it outside of `mx.compile` and other transformations, with trees of the same
        structure on every rank.

        Args:
            tree: Nested dicts, lists and tuples of arrays; lazy gradients are best, as their
                computation then runs beside the messages.
        """
        leaves: list[mx.array] = []
        tree_map(leaves.append, tree)
        wires = [leaf.astype(self._wire(leaf.dtype)) for leaf in leaves]
        summed = wires if self.group.size == 1 else self._all_sum(wires)
        results = iter(
            wire.astype(self._result(leaf.dtype))
            for leaf, wire in zip(leaves, summed, strict=True)
        )
        return tree_map(lambda leaf: next(results), tree)

    def _all_sum(self, wires: list[mx.array]) -> list[mx.array]:
        sizes = [wire.nbytes for wire in wires]
        self.message_bytes = sum(sizes)
        if self.bucket_bytes is None:
            self.bucket_bytes = self._measured(sum(sizes))
        plan = plan_buckets(sizes, [wire.dtype for wire in wires], self.bucket_bytes)
        # All of them are asked for before the first starts: on a host whose cores the messages
        # keep busy, Python would be slow to ask for the next one.
        totals = [self.group.all_sum(_join([wires[i] for i in bucket])) for bucket in plan]
        for total in totals:
            mx.async_eval(total)
        mx.eval(totals)
        summed = list(wires)
        for bucket, total in zip(plan, totals, strict=True):
            parts = _cut(total, [wires[i].shape for i in bucket])
            for i, part in zip(bucket, parts, strict=True):
                summed[i] = part
        return summed

    def _measured(self, total_bytes: int) -> int:
        fit = measure_link(self.group)
        on_cpu = mx.default_device() == mx.cpu
        alone = measure_join(self.group) if on_cpu else fit.seconds_per_byte
        chosen = fit.bucket_bytes(total_bytes, alone)
        if self.group.rank == 0:
            _log.info(
                "%s: %s; %.1f MiB of gradients go in buckets of %.1f MiB",
                self.group, fit, total_bytes / 2**20, chosen / 2**20,
            )  # fmt: skip
        return chosen

    def _wire(self, dtype: mx.Dtype) -> mx.Dtype:
        return dtype if self.wire_dtype is None or dtype not in _NARROW else self.wire_dtype

    def _result(self, dtype: mx.Dtype) -> mx.Dtype:
        if self.wire_dtype is None or dtype not in _NARROW:
            return dtype
        return mx.float32 if self.wire_dtype == mx.float32 else dtype


def plan_buckets(
    sizes: Sequence[int], dtypes: Sequence[Hashable], bucket_bytes: int
) -> list[list[int]]:
    """Which arrays travel together, in the order in which the messages leave.

    Goes through the arrays from last to first and fills one bucket per dtype; a bucket leaves
    when the next array would not fit. An array larger than a bucket travels alone. Within a bucket
    they keep their order: MLX computes the last input of a joined array first, and computing
    gradients from the first layer on would hold the activations of recomputed layers.

    Args:
        sizes: Bytes of each array.
        dtypes: Dtype of each array.
        bucket_bytes: Bytes of a full bucket.
    """
    plan: list[list[int]] = []
    filling: dict[Hashable, tuple[list[int], int]] = {}  # a bucket and its bytes
    for i in reversed(range(len(sizes))):
        bucket, num_bytes = filling.get(dtypes[i], ([], 0))
        if bucket and num_bytes + sizes[i] > bucket_bytes:
            plan.append(bucket)
            bucket, num_bytes = [], 0
        bucket.append(i)
        filling[dtypes[i]] = (bucket, num_bytes + sizes[i])
    return [bucket[::-1] for bucket in [*plan, *(bucket for bucket, _ in filling.values())]]


def _join(arrays: list[mx.array]) -> mx.array:
    if len(arrays) == 1:
        return arrays[0]
    return mx.concatenate([array.reshape(-1) for array in arrays])


def _cut(total: mx.array, shapes: list[tuple[int, ...]]) -> list[mx.array]:
    """The inverse of `_join`: views into `total`, nothing is copied."""
    if len(shapes) == 1:
        return [total.reshape(shapes[0])]
    ends = list(accumulate(math.prod(shape) for shape in shapes[:-1]))
    parts = mx.split(total, ends)
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
