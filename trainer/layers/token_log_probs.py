"""Log-probabilities of given tokens straight from hidden states, with exact gradients under any cotangent.

As in the cross-entropy (`linear_cross_entropy`, which sums and therefore needs no second look at a logit) the head is
taken in chunks of rows. A loss that does more than sum them has a cotangent of its own for each token. Where the head is
frozen and each token has one id, the gradient of a token's log-probability is made in the forward pass, and the backward
pass scales it; elsewhere the backward pass makes the logits again, chunk by chunk.

Letters: B rows of a batch, L tokens, K ids of a token, D hidden dims, V vocabulary (this rank's part of it), N rows that
reach the head.
"""

from collections.abc import Callable

import mlx.core as mx

from parallel import Head
from trainer.layers.elementwise import exp
from trainer.layers.head_chunks import Projection, chunk_rows, rows_to_keep


def token_log_probs(
    hidden: mx.array,
    head: Head,
    ids: mx.array,
    mask: mx.array | None = None,
    *,
    max_targets: int | None = None,
    with_gradients: bool = True,
) -> mx.array:
    """Log-probability of each given token under the softmax over the whole vocabulary.

    Args:
        hidden: (B, L, D), the states that predict.
        head: The output head, also tied, quantized, with LoRA, or split over the ranks of `head.group` (then `ids` and
            `hidden` are the same on all of them, and so is what the result is used for).
        ids: (B, L) or (B, L, K) int token ids of the whole vocabulary; an id may come twice.
        mask: (B, L) bool, False where the result is 0 and the head is not asked. Default: all count.
        max_targets: How many True entries `mask` has at most; see `linear_cross_entropy`.
        with_gradients: False leaves out the gradients' work; the result then has no gradient.

    Returns:
        float32, in the shape of `ids`, with gradients for `hidden` and the head's trainable arrays.
    """
    total = hidden.size // hidden.shape[-1]
    rows, flat_ids = hidden.reshape(total, -1), ids.reshape(total, -1)
    counts = mx.ones((total,), dtype=mx.bool_) if mask is None else mask.reshape(total)
    chunk = chunk_rows(Projection(head)(rows[:1]).shape[-1])
    num_rows = total if mask is None else rows_to_keep(counts, max_targets)
    order = mx.argsort(mx.logical_not(counts)) if num_rows < total else None
    if order is not None:
        rows, flat_ids = rows[order[:num_rows]], flat_ids[order[:num_rows]]
    arrays = [array for _, array in Projection(head).trainable]
    values = _log_probs(head, flat_ids, chunk, with_gradients)(rows, *arrays)
    if order is not None:
        # The place of each row among those that were asked for; those that were not are masked below.
        values = values[mx.minimum(mx.argsort(order), num_rows - 1)]
    return mx.where(counts[:, None], values, 0.0).reshape(ids.shape)


def _log_probs(head: Head, ids: mx.array, chunk: int, with_gradients: bool) -> Callable[..., mx.array]:
    """A function of (rows (N, D), *trainable arrays) to log-probabilities (N, K)."""
    projection = Projection(head)
    is_kept = with_gradients and ids.shape[1] == 1 and not projection.trainable

    def of_chunk(start: int) -> Callable[..., mx.array]:
        return lambda piece, *arrays: _of_logits(projection(piece, list(arrays)), ids[start : start + chunk], head)

    @mx.custom_function
    def run(rows: mx.array, *arrays: mx.array) -> tuple[mx.array, ...]:
        values, row_grads, before = [], [], None
        for start, piece in _pieces(rows, chunk):
            piece = piece if before is None else mx.depends([piece], before)[0]
            if is_kept:
                ones = mx.ones((piece.shape[0], 1))
                (value,), (grad,) = mx.vjp(of_chunk(start), [piece], [ones])
                row_grads.append(grad)
            else:
                value = of_chunk(start)(piece, *arrays)
            values.append(value)
            before = [value, *row_grads[-1:]]
        kept = [mx.concatenate(row_grads)] if is_kept else []
        return (mx.concatenate(values), *kept)

    @run.vjp
    def run_vjp(primals, cotangents, outputs):
        assert with_gradients, "token_log_probs(with_gradients=False) has no gradient"
        cotangent = cotangents[0] if isinstance(cotangents, (tuple, list)) else cotangents
        rows, *arrays = primals if isinstance(primals, (tuple, list)) else (primals,)
        if is_kept:
            return ((cotangent * outputs[1]).astype(rows.dtype),)
        row_grads, sums, before = [], None, None
        for start, piece in _pieces(rows, chunk):
            piece = piece if before is None else mx.depends([piece], before)[0]
            _, (row_grad, *grads) = mx.vjp(of_chunk(start), [piece, *arrays], [cotangent[start : start + chunk]])
            grads = [grad.astype(mx.float32) for grad in grads]
            sums = grads if sums is None else [a + b for a, b in zip(sums, grads, strict=True)]
            row_grads.append(row_grad)
            before = [row_grad, *sums]
        return (mx.concatenate(row_grads), *(s.astype(a.dtype) for s, a in zip(sums or [], arrays, strict=True)))

    def values(*arrays: mx.array) -> mx.array:
        result = run(*arrays)
        return result[0] if isinstance(result, (tuple, list)) else result

    return values


def _pieces(rows: mx.array, chunk: int) -> list[tuple[int, mx.array]]:
    return [(start, rows[start : start + chunk]) for start in range(0, rows.shape[0], chunk)]


def _of_logits(logits: mx.array, ids: mx.array, head: Head) -> mx.array:
    """log softmax(logits (N, V))[ids (N, K)], from one exponential per logit for value and gradient."""
    local = ids - head.first
    is_here = (local >= 0) & (local < logits.shape[-1])
    local = mx.where(is_here, local, 0)

    @mx.custom_function
    def run(logits: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        largest = head.group.all_max(logits.max(axis=-1, keepdims=True))
        powers = exp(logits - largest)
        picked = mx.where(is_here, mx.take_along_axis(logits, local, axis=-1) - largest, 0.0)
        summed = head.group.all_sum(mx.concatenate([powers.sum(axis=-1, keepdims=True), picked], axis=-1))
        total = summed[:, :1]
        return summed[:, 1:] - mx.log(total), powers, total

    @run.vjp
    def run_vjp(primal, cotangents, outputs):
        _, powers, total = outputs
        given = cotangents[0]
        gradient = powers * (-given.sum(axis=-1, keepdims=True) / total)
        places = mx.arange(logits.shape[0])[:, None]
        return gradient.at[places, local].add(mx.where(is_here, given, 0.0))

    return run(logits)[0]
