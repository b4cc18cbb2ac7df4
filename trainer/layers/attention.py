"""Causal attention whose training memory grows with T, not T * T: blocks of queries, backward pass by hand.

A block of queries meets only the keys it may see (causal blocks, sliding windows), so half of the work of a full T
x T product is never done. The backward pass keeps one number per query and computes the block's probabilities again
(arXiv 2205.14135, 2205.05198), or keeps them where they are small and exponentials are dear. Everything is plain
MLX.

Letters: B rows, H query heads, G key heads, R = H / G, T tokens, D dims of a head.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from comm import CustomFunction, custom_function
from trainer.layers.elementwise import exp

# Scores of one block of queries, in numbers, over all rows and heads.
MAX_SCORES = 2**25
# On a CPU, probabilities are kept for the backward pass up to this many keys per query: they then take about as
# much memory as the layer's other activations, and a third of attention's time is saved.
KEPT_KEYS = 1024
HIDDEN_SCORE = -1e30


@dataclass(frozen=True)
class Visibility:
    """Which keys a query sees: those at or before it and, if given, in its window and its document.

    Attributes:
        window: Number of keys a query sees, itself included; None = all before it.
        segments: (B, T) document numbers, or None.
        starts: For each query a key before which neither it nor a later one sees any; None = 0.
    """

    window: int | None = None
    segments: mx.array | None = None
    starts: np.ndarray | None = None

    def first_key(self, first_query: int) -> int:
        """A key before which no query from `first_query` on sees any."""
        start = 0 if self.starts is None else int(self.starts[first_query])
        return start if self.window is None else max(start, first_query - self.window + 1)

    def bias(self, queries: slice, keys: slice, repeats: int, after: mx.array) -> mx.array:
        """0 or a very negative number to add to the scores: (1 or B, 1, repeats * queries, keys), float32.

        It is made once `after` is there: free of it, the biases of all blocks and layers could be made ahead, or
        under `mx.compile` once for all layers and passes, and would fill memory with T * T numbers.
        """
        rows, columns = mx.arange(queries.start, queries.stop)[:, None], mx.arange(keys.start, keys.stop)
        rows = mx.depends([rows], [after])[0]
        hidden = columns > rows
        if self.window is not None:
            hidden = hidden | (columns <= rows - self.window)
        hidden = hidden[None, None]
        if self.segments is not None:
            segments = mx.depends([self.segments], [after])[0]
            hidden = hidden | (segments[:, None, queries, None] != segments[:, None, None, keys])
        return mx.tile(hidden.astype(mx.float32) * HIDDEN_SCORE, (1, 1, repeats, 1))


def default_block_size(num_rows_and_heads: int, num_keys: int) -> int:
    """Queries of a block: 64 on a CPU, 256 on a GPU; fewer (at least 16) to keep scores in `MAX_SCORES`."""
    size = 64 if mx.default_device() == mx.cpu else 256
    while size > 16 and size * num_rows_and_heads * num_keys > MAX_SCORES:
        size //= 2
    return size


def keeps_probabilities(num_keys: int) -> bool:
    """Whether probabilities are kept for the backward pass: on a CPU, up to `KEPT_KEYS` keys per query."""
    return mx.default_device() == mx.cpu and num_keys <= KEPT_KEYS


def blockwise_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
    window: int | None = None,
    segments: mx.array | None = None,
    starts: np.ndarray | None = None,
    block_size: int | None = None,
    keep: bool | None = None,
) -> mx.array:
    """softmax(scale * Q K^T) V with a causal mask, differentiable in all three arrays.

    Args:
        queries: (B, H, T, D).
        keys, values: (B, G, T, D) and (B, G, T, Dv), H a multiple of G.
        scale: Factor on the scores.
        window: Number of keys a query sees, itself included. Default: all.
        segments: (B, T) int; a query sees only keys with its own number.
        starts: (T,) what the caller knows of where documents begin, to skip keys: see `Visibility`. Default:
            nothing.
        block_size: Queries of a block. Default: `default_block_size`.
        keep: Whether the backward pass finds the probabilities or makes them again. Default:
            `keeps_probabilities`.

    Returns:
        (B, H, T, Dv) in the queries' dtype. Softmax and sums are in float32.
    """
    B, H, T, D = queries.shape
    num_keys = T if window is None else min(T, window)
    blocks = _Blocks(
        repeats=H // keys.shape[1],
        scale=scale,
        visible=Visibility(None if window is None or window >= T else window, segments, starts),
        size=block_size or default_block_size(B * H, num_keys),
        keep=keeps_probabilities(num_keys) if keep is None else keep,
    )
    grouped = queries.reshape(B, keys.shape[1], blocks.repeats, T, D)
    return blocks.attention()(grouped, keys, values)[0].reshape(B, H, T, values.shape[-1])


@dataclass(frozen=True)
class _Blocks:
    """The block loops. Queries and the like are (B, G, R, T, D); a block of them is (B, G, R * block, D)."""

    repeats: int
    scale: float
    visible: Visibility
    size: int
    keep: bool

    def attention(self) -> CustomFunction[tuple[mx.array, ...]]:
        """Function of (queries, keys, values) giving (outputs, logarithms of softmax sums, kept powers...)."""

        @custom_function
        def run(queries: mx.array, keys: mx.array, values: mx.array) -> tuple[mx.array, ...]:
            return self._forward(queries, keys, values)

        @run.vjp
        def run_vjp(primals, cotangents, outputs):
            queries, keys, values = primals
            return self._backward(queries, keys, values, cotangents[0], outputs[0], outputs[1], outputs[2:])

        return run

    def _spans(self, num_tokens: int) -> list[tuple[slice, slice]]:
        starts = range(0, num_tokens, self.size)
        ends = [min(start + self.size, num_tokens) for start in starts]
        return [(slice(start, end), slice(self.visible.first_key(start), end)) for start, end in zip(starts, ends)]

    def _fold(self, x: mx.array, span: slice) -> mx.array:
        x = x[:, :, :, span]
        return x.reshape(*x.shape[:2], -1, x.shape[-1])

    def _unfold(self, x: mx.array) -> mx.array:
        return x.reshape(*x.shape[:2], self.repeats, -1, x.shape[-1])

    def _scores(self, query: mx.array, key: mx.array, rows: slice, columns: slice) -> mx.array:
        bias = self.visible.bias(rows, columns, self.repeats, after=query)
        if query.dtype == mx.float32:
            return mx.addmm(bias, query * self.scale, key.swapaxes(-1, -2))
        return (query @ key.swapaxes(-1, -2)).astype(mx.float32) * self.scale + bias

    def _forward(self, queries: mx.array, keys: mx.array, values: mx.array) -> tuple[mx.array, ...]:
        outputs: list[mx.array] = []
        log_sums, kept = [], []
        for rows, columns in self._spans(queries.shape[3]):
            query = self._fold(queries, rows)
            if outputs:
                # One block after the other, so that the scores of one are gone before the next one's are made.
                query = mx.depends([query], [outputs[-1]])[0]
            scores = self._scores(query, keys[:, :, columns], rows, columns)
            largest = scores.max(axis=-1, keepdims=True)
            powers = exp(scores - largest)
            total = powers.sum(axis=-1, keepdims=True)
            output = (powers.astype(values.dtype) @ values[:, :, columns]) / total
            outputs.append(output.astype(queries.dtype))
            if self.keep:
                log_sums.append(total)
                kept.append(powers.astype(values.dtype))
            else:
                log_sums.append(largest + mx.log(total))
        join = lambda blocks: mx.concatenate([self._unfold(x) for x in blocks], axis=3)  # noqa: E731
        return join(outputs), join(log_sums), *kept

    def _backward(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        d_outputs: mx.array,
        outputs: mx.array,
        log_sums: mx.array,
        kept: list[mx.array],
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Gradients of queries, keys and values; with `kept` powers, `log_sums` holds their plain sums."""
        d_blocks: list[mx.array] = []
        d_keys, d_values = mx.zeros(keys.shape, mx.float32), mx.zeros(values.shape, mx.float32)
        for i, (rows, columns) in enumerate(self._spans(queries.shape[3])):
            query, d_output, sums = (self._fold(x, rows) for x in (queries, d_outputs, log_sums))
            if d_blocks:
                query = mx.depends([query], [d_blocks[-1], d_keys, d_values])[0]
            d_output = d_output.astype(mx.float32)
            if self.keep:
                weights = kept[i]
                d_output = d_output / sums
            else:
                weights = exp(self._scores(query, keys[:, :, columns], rows, columns) - sums)
            towards = (d_output * self._fold(outputs, rows)).sum(axis=-1, keepdims=True)
            d_output = d_output.astype(values.dtype)
            d_scores = weights * (d_output @ values[:, :, columns].swapaxes(-1, -2) - towards)
            d_scores, weights = d_scores.astype(keys.dtype), weights.astype(keys.dtype)
            d_blocks.append((d_scores @ keys[:, :, columns]) * self.scale)
            d_keys = d_keys.at[:, :, columns].add(d_scores.swapaxes(-1, -2) @ (query * self.scale))
            d_values = d_values.at[:, :, columns].add(weights.swapaxes(-1, -2) @ d_output)
        d_queries = mx.concatenate([self._unfold(x) for x in d_blocks], axis=3)
        return d_queries.astype(queries.dtype), d_keys.astype(keys.dtype), d_values.astype(values.dtype)
