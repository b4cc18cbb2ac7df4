"""How fast a group's connection is: a latency and a bandwidth, measured on all_sum.

The model is time = latency + bytes * seconds_per_byte (Hockney's alpha and beta). All ranks get
the same numbers, those of the slowest.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from comm.group import Group
from comm.typed import number

# Messages like buckets: where ranks share cores, small ones tell nothing of these (two ring ranks on two cores: 0.4 ms
# for 256 KiB, 10 ms for 2 MiB).
PROBE_BYTES = (2 << 20, 4 << 20, 8 << 20, 16 << 20)
# Below the smaller size a busy host's scheduling, not the wire, decides the cost of a message.
SMALLEST_BUCKET_BYTES, LARGEST_BUCKET_BYTES = 32 << 20, 128 << 20
ROOM_SHARE = 0.05  # of a bucket, which ends where the next array would not fit


@dataclass(frozen=True)
class LinkFit:
    """What one all_sum costs: `latency_seconds + num_bytes * seconds_per_byte`."""

    latency_seconds: float
    seconds_per_byte: float

    def __str__(self) -> str:
        speed = 1e-9 / self.seconds_per_byte if self.seconds_per_byte else math.inf
        return f"all_sum takes {self.latency_seconds * 1e6:.0f} us plus {speed:.2f} GB/s"

    def bucket_bytes(self, total_bytes: int, alone_seconds_per_byte: float) -> int:
        """The bucket size at which the messages' latencies and what nothing hides cost the least.

        With buckets of b bytes, latency * total / b + b * alone_seconds_per_byte is lost. The
        messages nearest to the minimum that are of equal size are taken, as a small one left over
        costs a latency, too.

        Args:
            total_bytes: Bytes of all buckets.
            alone_seconds_per_byte: What one bucket costs while nothing else goes on. Where the
                backward pass runs on a GPU it hides every bucket but the last, so this is
                `seconds_per_byte`. On a CPU, which also carries the messages, nothing is hidden
                and only the joining of the first bucket happens alone (see `measure_join`).
        """
        if not alone_seconds_per_byte:
            return LARGEST_BUCKET_BYTES
        best = math.sqrt(self.latency_seconds * total_bytes / alone_seconds_per_byte)
        best = min(max(best, SMALLEST_BUCKET_BYTES), LARGEST_BUCKET_BYTES)
        num_messages = max(round(total_bytes / best), 1)
        equal = total_bytes / num_messages * (1 + ROOM_SHARE)
        return int(min(max(equal, SMALLEST_BUCKET_BYTES), LARGEST_BUCKET_BYTES))


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
    slowest = group.all_max(mx.array(seconds, dtype=mx.float32))
    return fit_link(num_bytes, np.array(slowest).tolist())


def measure_join(group: Group, num_bytes: int = 8 << 20) -> float:
    """Seconds that joining arrays into one message takes per byte, on the slowest rank."""
    part = mx.zeros((num_bytes // 8,), dtype=mx.float32)
    mx.eval(part)
    seconds = _median_seconds(lambda: mx.concatenate([part, part]))
    return number(group.all_max(mx.array(seconds / num_bytes, dtype=mx.float32)))


def time_all_sum(group: Group, num_bytes: int, num_repeats: int = 3) -> float:
    """Median time in seconds of one float32 all_sum of `num_bytes`, after one to warm up."""
    x = mx.zeros((max(num_bytes // 4, 1),), dtype=mx.float32)
    mx.eval(x)
    return _median_seconds(lambda: group.all_sum(x), num_repeats)


def _median_seconds(make: Callable[[], mx.array], num_repeats: int = 5) -> float:
    """Median time of evaluating a new array, after one to warm up."""
    mx.eval(make())
    times = []
    for _ in range(num_repeats):
        start = time.perf_counter()
        mx.eval(make())
        times.append(time.perf_counter() - start)
    return statistics.median(times)
