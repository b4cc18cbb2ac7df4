"""The output head taken in chunks of rows, so that the logits of all tokens never exist at once.

Letters: B rows of a batch, L tokens, D hidden dims, V vocabulary (this rank's part of it).
"""

import math

import mlx.core as mx

import comm
from parallel import Head, slots_of, swapped

# Logits of one chunk, in numbers, and its fewest rows: with less, reading the head's weights takes longer than
# multiplying.
CPU_LOGITS, GPU_LOGITS, MIN_ROWS = 2**21, 2**26, 128


def chunk_rows(vocabulary: int) -> int:
    """Rows of a chunk whose logits stay within the device's budget, but at least `MIN_ROWS`."""
    budget = CPU_LOGITS if mx.default_device() == mx.cpu else GPU_LOGITS
    return max(MIN_ROWS, budget // vocabulary // 64 * 64)


def rows_to_keep(weights: mx.array, max_targets: int | None) -> int:
    """At least as many as there are True entries, and few different numbers."""
    total = weights.size
    try:
        max_targets = int(comm.number(mx.sum(weights, stream=mx.cpu)))
    except ValueError:  # inside mx.compile
        max_targets = total if max_targets is None else max_targets
    step = max(64, math.ceil(total / 8 / 64) * 64)
    return min(total, math.ceil(max(max_targets, 1) / step) * step)


class Projection:
    """The head as a function of its trainable arrays and hidden rows."""

    def __init__(self, head: Head) -> None:
        self.head = head
        module = head.module
        self.trainable = [] if module is None else comm.named_arrays(module.trainable_parameters())

    def __call__(self, rows: mx.array, arrays: list[mx.array] | None = None) -> mx.array:
        """Logits of this rank's slice of the vocabulary, float32."""
        head = self.head
        slots = slots_of(head.module, [name for name, _ in self.trainable]) if arrays and head.module is not None else []
        with swapped(slots, arrays or []):
            return head.capped(head.projected(rows).astype(mx.float32))
