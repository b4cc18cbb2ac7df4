"""Collectives with a gradient, as the conjugate pairs of Megatron-LM and FSDP.

Each function says its forward and its backward; used in pairs, the gradient of a sharded model
equals the whole model's. Sources: Shoeybi et al., arXiv 1909.08053 (copy and sum); Korthikanti
et al., arXiv 2205.05198 (gather and reduce-scatter). With one rank each is the identity.
"""

import mlx.core as mx

from comm.group import Group
from comm.typed import custom_function


def copy_to_group(x: mx.array, group: Group) -> mx.array:
    """Enters a region that is split over the group. Pair: `sum_over_group`.

    Forward: `x` unchanged (equal on all ranks). Backward: the cotangents summed over the ranks.
    """
    if group.size == 1:
        return x

    @custom_function
    def copy(x):
        return x

    @copy.vjp
    def copy_vjp(x, cotangent, output):
        return group.all_sum(cotangent)

    return copy(x)


def sum_over_group(x: mx.array, group: Group) -> mx.array:
    """Leaves a region that is split over the group. Pair: `copy_to_group`.

    Forward: `x` summed over the ranks. Backward: the cotangent unchanged (equal on all ranks).
    """
    return group.all_sum(x)


def gather_over_group(x: mx.array, group: Group, axis: int = -1) -> mx.array:
    """Makes a split array whole for what every rank computes alike. Pair: `scatter_over_group`.

    Forward: the ranks' `x` concatenated along `axis`. Backward: this rank's slice of the
    cotangent (equal on all ranks).
    """
    return group.all_gather(x, axis)


def scatter_over_group(x: mx.array, group: Group, axis: int = -1) -> mx.array:
    """Keeps this rank's part of an array that is equal on all ranks. Pair: `gather_over_group`.

    Forward: this rank's slice along `axis`. Backward: the ranks' cotangents concatenated.

    Raises:
        ValueError: The axis does not divide into equal parts.
    """
    if group.size == 1:
        return x
    axis = axis % x.ndim
    if x.shape[axis] % group.size:
        raise ValueError(
            f"scatter of shape {x.shape} along axis {axis}: "
            f"axis {axis} must be divisible by {group.size}."
        )

    @custom_function
    def scatter(x):
        return mx.contiguous(mx.split(x, group.size, axis)[group.rank])

    @scatter.vjp
    def scatter_vjp(x, cotangent, output):
        return group.all_gather(cotangent, axis)

    return scatter(x)


def gather_from_shards(x: mx.array, group: Group, axis: int = 0) -> mx.array:
    """Makes a sharded weight whole for use on different data. Pair: `reduce_scatter_over_group`.

    Forward: the ranks' `x` concatenated along `axis`. Backward: the cotangents summed over the
    ranks, of which this rank keeps its part.
    """
    if group.size == 1:
        return x

    @custom_function
    def gather(x):
        return group.all_gather(x, axis)

    @gather.vjp
    def gather_vjp(x, cotangent, output):
        return group.reduce_scatter(cotangent, axis)

    with mx.stream(group.stream):  # where the function's result is that of a collective
        return gather(x)


def reduce_scatter_over_group(x: mx.array, group: Group, axis: int = 0) -> mx.array:
    """Sums partial results and keeps this rank's part. Pair: `gather_from_shards`.

    Forward: this rank's part, along `axis`, of the sum. Backward: the ranks' cotangents
    concatenated along `axis`.
    """
    return group.reduce_scatter(x, axis)


def send_forward(x: mx.array, dst: int, group: Group) -> mx.array:
    """Sends activations to the next stage. Pair: `recv_forward` on rank `dst`.

    Forward: sends `x`; evaluate the result or nothing leaves. Backward: receives the gradient
    of `x` from `dst`; the local cotangent is not used.
    """

    @custom_function
    def send(x):
        return group.send(x, dst)

    @send.vjp
    def send_vjp(x, cotangent, output):
        return group.recv_like(x, dst)

    with mx.stream(group.stream):
        return send(x)


def recv_forward(like: mx.array, src: int, group: Group) -> mx.array:
    """Receives activations from the previous stage. Pair: `send_forward` on rank `src`.

    Forward: the array that `src` sends, of `like`'s shape and dtype. Backward: sends the
    cotangent to `src`. The gradient of `like` is that message: evaluate it or nothing leaves.
    """

    @custom_function
    def recv(like):
        return group.recv_like(like, src)

    @recv.vjp
    def recv_vjp(like, cotangent, output):
        return group.send(cotangent, src)

    with mx.stream(group.stream):
        return recv(like)
