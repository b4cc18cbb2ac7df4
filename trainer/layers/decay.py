"""One chunk of the gated delta rule from inside: decays between its tokens, scores, and the inverse they need.

A gate g in [0, 1] multiplies the state at every token; either one number per head (scalar) or one per key channel
(channel). Decays between two tokens are always products (or sums of logarithms) over the tokens between them, never
a quotient or a difference of long running totals: gates down to exp(-20), and exact zeros at document starts, lose
nothing.

Shapes: B batch, H key heads, R value heads per key head, N chunks, C tokens of a chunk, D key dims.
q, k are (B, H, 1, N, C, D); gates are (B, H, R, N, C, 1) when scalar and (B, H, R, N, C, D) per channel.
"""

from dataclasses import dataclass

import mlx.core as mx

# Below this block size the channel decays of all pairs of tokens are written out (C * BLOCK * D numbers a chunk);
# above it, a pair is split at the middle of its block and only the two halves' own decays are needed.
BLOCK = 8
# Decays below this are taken as 0. Beside a decay of 1 they are nothing, and as factors they would fill the matrix
# products with subnormal numbers, which x86 multiplies 50 times slower (at Qwen3.5's initial gates: 4 times
# slower layers).
NEGLIGIBLE = 1e-15


@dataclass
class Chunks:
    """Everything the recurrence needs to know about the tokens of each chunk (all arrays float32).

    Attributes:
        q_in: Queries times the decay since the chunk's start, inclusive (B, H, R, N, C, D).
        k_in: Keys times the same decay.
        k_out: Keys times the decay from their token to the chunk's end.
        query_key: Decayed scores q_i k_j for j <= i (B, H, R, N, C, C).
        key_key: Decayed scores k_i k_j for j < i.
        last: Decay over the whole chunk (B, H, R, N, D or 1, 1).
    """

    q_in: mx.array
    k_in: mx.array
    k_out: mx.array
    query_key: mx.array
    key_key: mx.array
    last: mx.array


def lower_triangle(size: int, offset: int = 0) -> mx.array:
    """1.0 where column <= row + offset, to multiply with: `where` is 4 times slower on CPUs."""
    return mx.tri(size, size, offset)


def without_negligible(decay: mx.array) -> mx.array:
    """`decay` with entries below `NEGLIGIBLE` set to 0."""
    return decay * (decay > NEGLIGIBLE)


def suffix_sum(x: mx.array, axis: int) -> mx.array:
    """Sum of each entry and those after it along `axis`."""
    return mx.cumsum(x, axis=axis, reverse=True)


class ScalarDecay:
    """Decay inside a chunk for one gate per head; gradients written by hand.

    Args:
        q, k: (B, H, 1, N, C, D).
        log_gate: (B, H, R, N, C, 1), at most 0.
        keep: 0.0 at tokens before which the state is cleared, else 1.0; (B, 1, 1, N, C, 1) or None.
    """

    def __init__(self, q: mx.array, k: mx.array, log_gate: mx.array, keep: mx.array | None) -> None:
        gate = mx.exp(log_gate) if keep is None else mx.exp(log_gate) * keep
        size = gate.shape[-2]
        strict = lower_triangle(size, -1)
        # Column j holds the running product of the gates after token j: no logarithm, no overflow, zeros stay
        # zeros.
        self.between = without_negligible(mx.cumprod(gate * strict + (1 - strict), axis=-2)) * lower_triangle(size)
        self.since_start = without_negligible(mx.cumprod(gate, axis=-2))
        self.to_end = self.between[..., -1:, :].swapaxes(-1, -2)
        self.q, self.k, self.keep, self.strict = q, k, keep, strict

    def chunks(self) -> Chunks:
        """The forward values."""
        k_t = self.k.swapaxes(-1, -2)
        self.values = Chunks(
            q_in=self.q * self.since_start,
            k_in=self.k * self.since_start,
            k_out=self.k * self.to_end,
            query_key=(self.q @ k_t) * self.between,
            key_key=(self.k @ k_t) * (self.between * self.strict),
            last=self.since_start[..., -1:, :],
        )
        return self.values

    def gradients(self, grads: Chunks) -> tuple[mx.array, mx.array, mx.array]:
        """Gradients for (q, k, log_gate) from the gradients of everything `chunks` returned.

        Each value is a product of gates, so its gradient for one gate's logarithm is value times gradient. Terms
        are only ever added, never cancelled: a strong gate's tiny gradient is as exact as the others.
        """
        now = self.values
        row_sum = lambda x: x.sum(axis=-1, keepdims=True)  # noqa: E731
        query_key = (grads.query_key * self.between).sum(axis=2, keepdims=True)
        key_key = (grads.key_key * (self.between * self.strict)).sum(axis=2, keepdims=True)
        over_values = lambda x: x.sum(axis=2, keepdims=True)  # noqa: E731
        dq = over_values(grads.q_in * self.since_start) + query_key @ self.k
        dk = over_values(grads.k_in * self.since_start + grads.k_out * self.to_end)
        dk = dk + query_key.swapaxes(-1, -2) @ self.q + (key_key + key_key.swapaxes(-1, -2)) @ self.k

        # A gate between tokens j and i is the reason for every pair with j before it and i not before it.
        pairs = suffix_sum(grads.query_key * now.query_key + grads.key_key * now.key_key, axis=-2) * self.strict
        outgoing = row_sum(grads.k_out * now.k_out)
        incoming = row_sum(grads.q_in * now.q_in + grads.k_in * now.k_in)
        d_log = row_sum(pairs) + suffix_sum(incoming, axis=-2) + mx.cumsum(outgoing, axis=-2, inclusive=False)
        d_log = d_log + grads.last * now.last
        return dq, dk, d_log if self.keep is None else d_log * self.keep


class ChannelDecay:
    """Decay inside a chunk for one gate per key channel (Kimi's form); the same arguments and results as
    `ScalarDecay`.

    Gradients are MLX's own of the (cheap) forward, taken again in the backward pass.
    """

    def __init__(self, q: mx.array, k: mx.array, log_gate: mx.array, keep: mx.array | None) -> None:
        self.inputs = [q, k, log_gate]
        self.keep = keep

    def _forward(self, q: mx.array, k: mx.array, log_gate: mx.array) -> list[mx.array]:
        if self.keep is not None:
            # exp(-10000) is 0 in float32 and, unlike minus infinity, has a gradient of 0.
            log_gate = log_gate * self.keep - 1e4 * (1 - self.keep)
        q, k = mx.broadcast_to(q, log_gate.shape), mx.broadcast_to(k, log_gate.shape)
        since_start = without_negligible(mx.exp(mx.cumsum(log_gate, axis=-2)))
        to_end = without_negligible(mx.exp(_sum_after(log_gate)))
        query_key, key_key = _channel_scores(q, k, log_gate)
        last = since_start[..., -1:, :].swapaxes(-1, -2)
        return [q * since_start, k * since_start, k * to_end, query_key, key_key, last]

    def chunks(self) -> Chunks:
        """The forward values."""
        return Chunks(*self._forward(*self.inputs))

    def gradients(self, grads: Chunks) -> tuple[mx.array, mx.array, mx.array]:
        """Gradients for (q, k, log_gate)."""
        cotangents = [grads.q_in, grads.k_in, grads.k_out, grads.query_key, grads.key_key, grads.last]
        _, (dq, dk, d_log) = mx.vjp(self._forward, self.inputs, cotangents)
        return dq, dk, d_log


def _sum_after(x: mx.array) -> mx.array:
    """Sum of the entries after each one along axis -2."""
    return mx.concatenate([suffix_sum(x, -2)[..., 1:, :], mx.zeros_like(x[..., :1, :])], axis=-2)


def _channel_scores(q: mx.array, k: mx.array, log_gate: mx.array) -> tuple[mx.array, mx.array]:
    """Decayed q k and k k scores of a block of tokens (axis -2): both (..., C, C), the second without its
    diagonal.
    """
    size = q.shape[-2]
    if size <= BLOCK:
        return _small_channel_scores(q, k, log_gate)
    half = size // 2
    split = lambda x: mx.unflatten(x, -2, (2, half))  # noqa: E731
    q2, k2, log2 = split(q), split(k), split(log_gate)
    query_key, key_key = _channel_scores(q2, k2, log2)
    early = k2[..., 0, :, :] * without_negligible(mx.exp(_sum_after(log2[..., 0, :, :])))
    since_middle = without_negligible(mx.exp(mx.cumsum(log2[..., 1, :, :], axis=-2)))
    late = [x[..., 1, :, :] * since_middle for x in (q2, k2)]
    across = mx.concatenate(late, axis=-2) @ early.swapaxes(-1, -2)
    return _join(query_key, across[..., :half, :]), _join(key_key, across[..., half:, :])


def _small_channel_scores(q: mx.array, k: mx.array, log_gate: mx.array) -> tuple[mx.array, mx.array]:
    size = q.shape[-2]
    lower, strict = lower_triangle(size), lower_triangle(size, -1)
    after = log_gate[..., :, None, :] * strict[..., None]
    decayed = k[..., None, :, :] * (mx.exp(mx.cumsum(after, axis=-3)) * lower[..., None])
    return (q[..., :, None, :] * decayed).sum(-1), (k[..., :, None, :] * decayed).sum(-1) * strict


def _join(diagonal: mx.array, below: mx.array) -> mx.array:
    """[[diagonal[0], 0], [below, diagonal[1]]] of (..., 2, c, c) and (..., c, c)."""
    top = mx.concatenate([diagonal[..., 0, :, :], mx.zeros_like(below)], axis=-1)
    return mx.concatenate([top, mx.concatenate([below, diagonal[..., 1, :, :]], axis=-1)], axis=-2)


def unit_lower_inverse(lower: mx.array) -> mx.array:
    """Inverse of I + `lower` for strictly lower triangular `lower` (..., C, C), C a power of two.

    Blocks are doubled: inv([[A, 0], [X, B]]) = [[inv A, 0], [-inv B X inv A, inv B]]. The shorter product
    (I - L)(I + L^2)(I + L^4)... has terms that grow like binomial(C, C/2) when keys repeat, and loses every digit.
    """
    size = lower.shape[-1]
    block, inverse = min(4, size), None
    diagonal = _diagonal_blocks(lower, block)
    square = diagonal @ diagonal
    inverse = mx.eye(block) - diagonal + square - diagonal @ square
    while block < size:
        pairs = _diagonal_blocks(lower, 2 * block)[..., block:, :block]
        inverse = mx.unflatten(inverse, -3, (-1, 2))
        below = -(inverse[..., 1, :, :] @ pairs @ inverse[..., 0, :, :])
        below = below * (mx.abs(below) > NEGLIGIBLE)
        inverse = _join(inverse, below)
        block *= 2
    return inverse.reshape(lower.shape)


def _diagonal_blocks(x: mx.array, block: int) -> mx.array:
    """(..., C, C) -> (..., C / block, block, block)."""
    num = x.shape[-1] // block
    x = mx.unflatten(mx.unflatten(x, -1, (num, block)), -3, (num, block))
    return mx.diagonal(x, axis1=-4, axis2=-2).moveaxis(-1, -3)
