"""`COMM_DEBUG=1`: before each collective, are all ranks at the same one?

Ranks at different operations, shapes or dtypes do not fail in MLX: they get wrong values. In
debug mode they exchange what they are about to do, and every collective is evaluated at once, so
that its order is the program's. Slow, and not for use inside `mx.compile`; send and recv are not
checked.
"""

from collections import Counter
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

WIDTH = 96  # bytes of one rank's entry


def encode_call(number: int, operation: str, x: mx.array) -> mx.array:
    """One rank's entry as an array of shape (1, WIDTH)."""
    dtype = str(x.dtype).split(".")[-1]
    text = f"#{number} {operation} {tuple(x.shape)} {dtype}"
    return mx.array(np.frombuffer(text[:WIDTH].ljust(WIDTH).encode(), dtype=np.uint8))[None]


def check_calls(entries: mx.array, members: Sequence[int]) -> None:
    """Compares the entries of all ranks, shape (size, WIDTH).

    Raises:
        RuntimeError: They differ; names the odd ranks, by world rank, and both operations.
    """
    calls = [bytes(row).decode().strip() for row in np.array(entries)]
    common, _ = Counter(calls).most_common(1)[0]
    odd = [f"rank {m} is at {call}" for m, call in zip(members, calls, strict=True) if call != common]
    if odd:
        first = members[calls.index(common)]
        raise RuntimeError(
            f"The ranks are at different operations: {'; '.join(odd)}; "
            f"rank {first} is at {common}."
        )
