"""Small Python objects between ranks, as JSON over a group's own collectives.

For settings, digests and addresses, not for data: every call is evaluated at once.
"""

import json
from typing import Any

import mlx.core as mx
import numpy as np

from comm.group import Group
from comm.typed import integers, number


def broadcast_object(obj: Any, group: Group, root: int = 0) -> Any:
    """The root's `obj` on every rank; the others may pass anything.

    Args:
        obj: Anything JSON can hold.
        group: The ranks that take part; all must call.
        root: The rank whose object it is. Default: 0.
    """
    payload = _encode(obj) if group.rank == root else mx.zeros((0,), dtype=mx.uint8)
    length = int(number(group.all_max(mx.array([payload.size], dtype=mx.int32))))
    found = _decode(group.broadcast(_padded(payload, length), root), length)
    group.progress.settle()
    return found


def all_gather_object(obj: Any, group: Group) -> list[Any]:
    """Every rank's `obj`, in rank order, on every rank. Objects are anything JSON can hold."""
    payload = _encode(obj)
    lengths = integers(group.all_gather(mx.array([payload.size], dtype=mx.int32)))
    rows = group.all_gather(_padded(payload, max(lengths))[None])
    found = [_decode(row, length) for row, length in zip(rows, lengths, strict=True)]
    group.progress.settle()
    return found


def _encode(obj: Any) -> mx.array:
    return mx.array(np.frombuffer(json.dumps(obj).encode(), dtype=np.uint8))


def _padded(payload: mx.array, length: int) -> mx.array:
    return mx.concatenate([payload, mx.zeros((length - payload.size,), dtype=mx.uint8)])


def _decode(payload: mx.array, length: int) -> Any:
    return json.loads(bytes(np.array(payload)[:length]).decode())
