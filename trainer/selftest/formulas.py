"""What this package's operations compute, as plain formulas for float64 on the CPU.

Letters: B rows, T tokens, H query heads, G key heads, D head dims, C channels, K taps, V vocabulary.
"""

import mlx.core as mx


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """gate * sigmoid(gate) * x."""
    return gate * (1 / (1 + mx.exp(-gate))) * x


def convolution(x: mx.array, weight: mx.array, segments: mx.array) -> mx.array:
    """A causal depthwise convolution of x (B, T, C) with weight (C, K, 1), inside each document of segments (B, T)."""
    taps, T = weight.shape[1], x.shape[1]
    total = mx.zeros_like(x)
    for distance in range(taps):
        before = mx.pad(x, [(0, 0), (distance, 0), (0, 0)])[:, :T]
        same = mx.pad(segments, [(0, 0), (distance, 0)])[:, :T] == segments
        total = total + mx.where(same[..., None], before, 0) * weight[:, taps - 1 - distance, 0]
    return total


def gated_delta(q: mx.array, k: mx.array, v: mx.array, log_gate: mx.array, beta: mx.array) -> mx.array:
    """The gated delta rule token by token: q, k (B, T, Hk, D), v (B, T, Hv, D), log_gate and beta (B, T, Hv)."""
    B, T, Hv, D = v.shape
    q, k = (mx.repeat(x, Hv // x.shape[2], axis=2) for x in (q, k))
    state, rows = mx.zeros((B, Hv, k.shape[-1], D), dtype=v.dtype), []
    for t in range(T):
        state = state * mx.exp(log_gate[:, t])[..., None, None]
        read = (state * k[:, t, :, :, None]).sum(axis=-2)
        state = state + k[:, t, :, :, None] * (beta[:, t, :, None] * (v[:, t] - read))[:, :, None]
        rows.append((state * q[:, t, :, :, None]).sum(axis=-2))
    return mx.stack(rows, axis=1)


def attention(
    q: mx.array, k: mx.array, v: mx.array, window: int | None = None, segments: mx.array | None = None
) -> mx.array:
    """Causal softmax attention of q (B, H, T, D) over k, v (B, G, T, D), in a window, inside documents (B, T)."""
    T, repeats = q.shape[2], q.shape[1] // k.shape[1]
    k, v = (mx.repeat(x, repeats, axis=1) for x in (k, v))
    distance = mx.arange(T)[:, None] - mx.arange(T)
    visible = (distance >= 0) & (distance < (window or T))
    if segments is not None:
        visible = visible & (segments[:, None, :, None] == segments[:, None, None, :])
    scores = mx.where(visible, q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5, -1e30)
    powers = mx.exp(scores - scores.max(axis=-1, keepdims=True))
    return (powers / powers.sum(axis=-1, keepdims=True)) @ v


def log_probs(hidden: mx.array, weight: mx.array, ids: mx.array) -> mx.array:
    """log softmax(hidden (B, T, D) weight^T (D, V)) at ids (B, T)."""
    logits = hidden @ weight.T
    logits = logits - logits.max(axis=-1, keepdims=True)
    picked = mx.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    return picked - mx.log(mx.exp(logits).sum(axis=-1))


def lora(x: mx.array, weight: mx.array, lora_a: mx.array, lora_b: mx.array, scale: float) -> mx.array:
    """x (T, C) weight^T + scale x A B."""
    return x @ weight.T + scale * (x @ lora_a) @ lora_b
