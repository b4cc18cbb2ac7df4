"""How fast a group's connection is: a latency and a bandwidth, measured on all_sum.

The model is time = latency + bytes * seconds_per_byte (Hockney's alpha and beta). All ranks get
the same numbers, those of the slowest.
"""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from comm.group import Group

PROBE_BYTES = (4 << 10, 256 << 10, 2 << 20, 8 << 20)
# Below the smaller size a busy host's scheduling, not the wire, decides the cost of a message.
SMALLEST_BUCKET_BYTES, LARGEST_BUCKET_BYTES = 16 << 20, 128 << 20


@dataclass(frozen=True)
class LinkFit:
    """What one all_sum costs: `latency_seconds + num_bytes * seconds_per_byte`."""

    latency_seconds: float
    seconds_per_byte: float

    def __str__(self) -> str:
        speed = 1e-9 / self.seconds_per_byte if self.seconds_per_byte else math.inf
        return f"all_sum takes {self.latency_seconds * 1e6:.0f} us plus {speed:.2f} GB/s"

    def bucket_bytes(self, total_bytes: int) -> int:
        """The bucket size at which latency and the last, uncovered bucket cost the least.

        With buckets of b bytes and the rest hidden behind the backward pass, what shows is
        latency * total / b + b * seconds_per_byte; its minimum is at the returned b.
        """
        if not self.seconds_per_byte:
            return LARGEST_BUCKET_BYTES
        best = math.sqrt(self.latency_seconds * total_bytes / self.seconds_per_byte)
        return int(min(max(best, SMALLEST_BUCKET_BYTES), LARGEST_BUCKET_BYTES))


def fit_link(num_bytes: Sequence[int], seconds: Sequence[float]) -> LinkFit:
    """The line through (bytes, seconds) with the least relative error, never below zero."""
    sizes, times = np.asarray(num_bytes, dtype=float), np.asarray(seconds, dtype=float)
    rows = np.stack([1 / times, sizes / times], axis=1)
    latency, per_byte = np.linalg.lstsq(rows, np.ones(len(times)), rcond=None)[0]
    if latency < 0:
        latency, per_byte = 0.0, float(np.mean(times / sizes))
    return LinkFit(max(float(latency), 0.0), max(float(per_byte), 0.0))


def measure_link(group: Group, num_bytes: Sequence[int] = PROBE_BYTES) -> LinkFit:
    """Times all_sum of a few sizes on `group` and fits the line; every rank must call it."""
    if group.size == 1:
        return LinkFit(0.0, 0.0)
    seconds = [time_all_sum(group, size) for size in num_bytes]
    slowest = group.all_max(mx.array(seconds, dtype=mx.float32)).tolist()
    return fit_link(num_bytes, slowest)


def time_all_sum(group: Group, num_bytes: int, num_repeats: int = 5) -> float:
    """Median time in seconds of one float32 all_sum of `num_bytes`, after one to warm up."""
    x = mx.zeros((max(num_bytes // 4, 1),), dtype=mx.float32)
    mx.eval(x, group.all_sum(x))
    times = []
    for _ in range(num_repeats):
        start = time.perf_counter()
        mx.eval(group.all_sum(x))
        times.append(time.perf_counter() - start)
    return statistics.median(times)
