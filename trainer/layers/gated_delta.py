"""Gated delta rule, chunk-parallel, with a hand-written backward pass (arXiv 2412.06464, 2406.06484).

The recurrence, per head, with state S (key dims x value dims), gate g and write strength beta:

    S <- g S;   S <- S + k beta (v - S^T k)^T;   y = S^T q

mlx-lm trains it with a Python loop over tokens. Here tokens go in chunks: within a chunk all is matrix products,
between chunks one state is carried. The backward pass keeps one state per chunk and computes the rest again.

Shapes: B batch, T tokens, Hk key heads, Hv value heads (a multiple of Hk), Dk and Dv their dims, N chunks of C
    tokens, R = Hv / Hk.
"""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from comm import custom_function
from trainer.layers.decay import ChannelDecay, Chunks, ScalarDecay, unit_lower_inverse


def default_chunk_tokens(key_dims: int) -> int:
    """64 (fewer stored states, larger products); 32 for small heads on a CPU, where it is 1.5 times faster."""
    return 32 if mx.default_device() == mx.cpu and key_dims < 128 else 64


def gated_delta_rule(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_gate: mx.array,
    beta: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    segments: mx.array | None = None,
    *,
    chunk_tokens: int | None = None,
) -> tuple[mx.array, mx.array]:
    """Outputs and last state of the gated delta rule, differentiable in all floating-point arguments.

    Args:
        q, k: (B, T, Hk, Dk), normalised and scaled by the caller.
        v: (B, T, Hv, Dv).
        log_gate: Logarithm of the gate, at most 0: (B, T, Hv), or (B, T, Hv, Dk) for one gate per channel.
        beta: (B, T, Hv).
        state: (B, Hv, Dv, Dk) in mlx-lm's layout; zeros when None.
        mask: (B, T) bool; False tokens leave the state as it is and give zeros.
        segments: (B, T) int; the state is cleared wherever the number differs from the token before.
        chunk_tokens: Tokens of a chunk, a power of two. Default: `default_chunk_tokens`.

    Returns:
        y (B, T, Hv, Dv) in q's dtype, and the state after the last token, (B, Hv, Dv, Dk) float32.

    Raises:
        ValueError: When Hv is not a multiple of Hk.
    """
    B, T, Hk, Dk = q.shape
    Hv, Dv = v.shape[-2:]
    if Hv % Hk:
        raise ValueError(f"{Hv} value heads; must be a multiple of the number of key heads, {Hk}.")
    if mask is not None:
        beta = beta * mask[..., None]
        log_gate = log_gate * mask.reshape(B, T, *[1] * (log_gate.ndim - 2))
    split = _Split(T, Hv // Hk, chunk_tokens or default_chunk_tokens(Dk))
    keep = None if segments is None else 1.0 - split.chunked(_clears_state(segments), 1)
    if state is None:
        state = mx.zeros((B, Hv, Dv, Dk), mx.float32)
    state = state.astype(mx.float32).swapaxes(-1, -2).reshape(B, Hk, Hv // Hk, Dk, Dv)
    v, log_gate, beta = (split.chunked(x) for x in (v, log_gate, beta))
    y, state = _recurrence(split.chunked(q, 1), split.chunked(k, 1), v, log_gate, beta, state, keep)
    y = split.joined(y).astype(q.dtype)
    if mask is not None:
        y = y * mask[..., None, None].astype(y.dtype)
    return y, state.reshape(B, Hv, Dk, Dv).swapaxes(-1, -2)


def gated_delta_update(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    *,
    use_kernel: bool = True,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
    segments: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """mlx-lm's function of this name, chunk-parallel. `use_kernel` is accepted and has no meaning here."""
    beta = mx.sigmoid(b)
    if allow_neg_eigval:
        beta = beta * 2.0
    rate = mx.exp(A_log.astype(mx.float32))
    if lower_bound is None:
        log_gate = -rate * nn.softplus(a + dt_bias)
    else:
        log_gate = lower_bound * mx.sigmoid(rate * (a.astype(mx.float32) + dt_bias))
    return gated_delta_rule(q, k, v, log_gate, beta, state, mask, segments)


def _clears_state(segments: mx.array) -> mx.array:
    """(B, T) -> (B, T, 1): True at the first token of each document but the row's first one, whose state is the
    argument's.
    """
    before = mx.concatenate([segments[:, :1], segments[:, :-1]], axis=1)
    return (segments != before)[..., None]


class _Split:
    """Moves (B, T, heads, dims) to (B, Hk, R or 1, N, C, dims) in float32, with T padded to whole chunks, and
    back.
    """

    def __init__(self, num_tokens: int, repeats: int, chunk_tokens: int) -> None:
        self.num_tokens, self.repeats = num_tokens, repeats
        # A short sequence is one chunk of the next power of two (at least 4, the inverse's smallest block).
        self.chunk = min(chunk_tokens, max(4, 1 << (num_tokens - 1).bit_length()))
        self.padding = -num_tokens % self.chunk

    def chunked(self, x: mx.array, repeats: int | None = None) -> mx.array:
        """Zeros as padding: a gate of exp(0) and a beta of 0 leave the state alone."""
        x = x.astype(mx.float32)
        if x.ndim == 3:
            x = x[..., None]
        if self.padding:
            x = mx.pad(x, [(0, 0), (0, self.padding), (0, 0), (0, 0)])
        B, T, heads, dims = x.shape
        repeats = repeats or self.repeats
        x = x.reshape(B, T // self.chunk, self.chunk, heads // repeats, repeats, dims)
        return x.transpose(0, 3, 4, 1, 2, 5)

    def joined(self, y: mx.array) -> mx.array:
        """(B, Hk, R, N, C, Dv) -> (B, T, Hv, Dv)."""
        B, Hk, R, N, C, Dv = y.shape
        return y.transpose(0, 3, 4, 1, 2, 5).reshape(B, N * C, Hk * R, Dv)[:, : self.num_tokens]


def _contiguous(*arrays: mx.array) -> list[mx.array]:
    """Copies in chunk order: each is used several times, and strided elementwise operations are slow on CPUs."""
    return [mx.contiguous(x) for x in arrays]


def _transpose(x: mx.array) -> mx.array:
    return x.swapaxes(-1, -2)


def _decay(q: mx.array, k: mx.array, log_gate: mx.array, keep: mx.array | None) -> ScalarDecay | ChannelDecay:
    return (ScalarDecay if log_gate.shape[-1] == 1 else ChannelDecay)(q, k, log_gate, keep)


def _recurrence(
    q: mx.array, k: mx.array, v: mx.array, log_gate: mx.array, beta: mx.array, state: mx.array, keep: mx.array | None
) -> tuple[mx.array, mx.array]:
    """All chunks: y (B, Hk, R, N, C, Dv) and the last state (B, Hk, R, Dk, Dv)."""

    @custom_function
    def run(*arrays: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        q, k, v, log_gate, beta, state = arrays
        q, k, v = _contiguous(q, k, v)
        chunks = _decay(q, k, log_gate, keep).chunks()
        writes, reads, _ = _writes(chunks, v, beta)
        before, written = [], []
        for i in range(v.shape[3]):
            value = mx.addmm(writes[:, :, :, i], reads[:, :, :, i], state, alpha=-1.0)
            before.append(state)
            written.append(value)
            state = mx.addmm(chunks.last[:, :, :, i] * state, _transpose(chunks.k_out[:, :, :, i]), value)
        states, values = mx.stack(before, axis=3), mx.stack(written, axis=3)
        return mx.addmm(chunks.q_in @ states, chunks.query_key, values), state, states

    @run.vjp
    def run_vjp(primals, cotangents, outputs):
        return _gradients(primals, keep, states=outputs[2], dy=cotangents[0], d_state=cotangents[1])

    y, last, _ = run(q, k, v, log_gate, beta, state)
    return y, last


def _writes(chunks: Chunks, v: mx.array, beta: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """What a chunk writes is `writes - reads @ state`; the third value is the inverse that makes a token see the
    ones before it.
    """
    inverse = unit_lower_inverse(beta * chunks.key_key)
    return inverse @ (beta * v), inverse @ (beta * chunks.k_in), inverse


def _gradients(
    primals: Sequence[mx.array],
    keep: mx.array | None,
    *,
    states: mx.array,
    dy: mx.array,
    d_state: mx.array,
) -> tuple[mx.array, ...]:
    """Gradients of `_recurrence` from the states at each chunk's start (B, Hk, R, N, Dk, Dv)."""
    q, k, v, log_gate, beta, _ = primals
    q, k, v, dy = _contiguous(q, k, v, dy)
    decay = _decay(q, k, log_gate, keep)
    chunks = decay.chunks()
    writes, reads, inverse = _writes(chunks, v, beta)
    values = mx.addmm(writes, reads, states, alpha=-1.0)

    # The recurrence backwards: only the gradient of the state passes from chunk to chunk.
    from_outputs = _transpose(chunks.query_key) @ dy
    from_reads = _transpose(chunks.q_in) @ dy
    ends, towards = [], []
    for i in reversed(range(v.shape[3])):
        ends.append(d_state)
        d_value = mx.addmm(from_outputs[:, :, :, i], chunks.k_out[:, :, :, i], d_state)
        towards.append(d_value)
        passed_on = chunks.last[:, :, :, i] * d_state + from_reads[:, :, :, i]
        d_state = mx.addmm(passed_on, _transpose(reads[:, :, :, i]), d_value, alpha=-1.0)
    d_ends, d_values = mx.stack(ends[::-1], axis=3), mx.stack(towards[::-1], axis=3)

    # With X = beta (v - k_in S) and values = inverse X: dX = inverse^T d_values, and the system's gradient is -dX
    # values^T.
    d_solved = _transpose(inverse) @ d_values
    d_system = -(d_solved @ _transpose(values))
    d_read = d_solved @ _transpose(states)
    d_last = (d_ends * states).sum(axis=-1, keepdims=True)
    grads = Chunks(
        q_in=dy @ _transpose(states),
        k_in=-beta * d_read,
        k_out=values @ _transpose(d_ends),
        query_key=dy @ _transpose(values),
        key_key=beta * d_system,
        last=d_last if log_gate.shape[-1] > 1 else d_last.sum(axis=-2, keepdims=True),
    )
    dq, dk, d_log_gate = decay.gradients(grads)
    d_beta = (d_solved * v).sum(-1, keepdims=True) - (d_read * chunks.k_in).sum(-1, keepdims=True)
    d_beta = d_beta + (d_system * chunks.key_key).sum(-1, keepdims=True)
    return dq, dk, beta * d_solved, d_log_gate, d_beta, d_state
