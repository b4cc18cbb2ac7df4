"""Cross-entropy straight from hidden states, without ever holding the logits of all tokens.

Rows that are no targets are dropped before the output head. The rest go through it chunk by chunk; each chunk's
loss and gradient are made in one go in the forward pass, from one exponential per logit, so the backward pass only
scales what is there.

Letters: B rows of a batch, L tokens, D hidden dims, V vocabulary (this rank's part of it).
"""

from collections.abc import Callable, Sequence

import mlx.core as mx

import comm
from comm import custom_function
from parallel import Head
from trainer.layers.elementwise import exp
from trainer.layers.head_chunks import Projection, chunk_rows, rows_to_keep


def linear_cross_entropy(
    hidden: mx.array,
    head: Head,
    targets: mx.array,
    mask: mx.array,
    *,
    max_targets: int | None = None,
    with_gradients: bool = True,
) -> tuple[mx.array, mx.array]:
    """Sum of the targets' cross-entropies, and how many there are.

    Args:
        hidden: (B, L, D), the states that predict `targets`.
        head: The output head, also tied, quantized, with LoRA, or split over the ranks of `head.group` (then
            `targets` and `hidden` are the same on all of them, and one sum and one maximum per row are
            exchanged).
        targets: (B, L) int token ids of the whole vocabulary.
        mask: (B, L) bool, False where a token does not count.
        max_targets: How many True entries `mask` has at most, for use inside `mx.compile`, where it cannot be
            read. Default: all. Elsewhere the number is read, and rounded up to one of eight sizes.
        with_gradients: False leaves out the gradients' work (evaluation); the result then has no gradient.

    Returns:
        loss_sum: float32 scalar, with gradients for `hidden` and the head's trainable arrays.
        num_tokens: int32 scalar.
    """
    total = targets.size
    rows, targets, weights = hidden.reshape(total, -1), targets.reshape(total), mask.reshape(total)
    chunk = chunk_rows(Projection(head)(rows[:1]).shape[-1])
    num_rows = rows_to_keep(weights, max_targets)
    if num_rows < total:
        chosen = mx.argsort(mx.logical_not(weights))[:num_rows]
        rows, targets, weights = rows[chosen], targets[chosen], weights[chosen]
    run = _loss_and_gradients(head, targets, weights.astype(mx.float32), chunk, with_gradients)
    arrays = [x for _, x in Projection(head).trainable]
    return run(rows, *arrays)[0], mask.sum()


def _loss_and_gradients(
    head: Head, targets: mx.array, weights: mx.array, chunk: int, with_gradients: bool
) -> Callable[..., tuple[mx.array, ...]]:
    """A function of (rows, *trainable arrays) whose first result is the loss; the others are the gradients it is
    going to need.
    """
    projection = Projection(head)

    def of_chunk(rows: mx.array, arrays: Sequence[mx.array], start: int) -> mx.array:
        piece = slice(start, start + chunk)
        logits = projection(rows, list(arrays))
        if not with_gradients:
            return _nll(logits, targets[piece], weights[piece], head)[0]
        return _nll_with_gradient(logits, targets[piece], weights[piece], head)

    @custom_function
    def run(rows: mx.array, *arrays: mx.array) -> tuple[mx.array, ...]:
        losses, row_grads = [], []
        sums: list[mx.array] = []
        before: list[mx.array] | None = None
        for start in range(0, rows.shape[0], chunk):
            piece = rows[start : start + chunk]
            if before is not None:
                # One chunk after the other: in a free order the logits of all of them could be alive at once.
                piece = mx.depends([piece], before)[0]
            if not with_gradients:
                losses.append(of_chunk(piece, arrays, start))
                before = losses[-1:]
                continue
            loss, (row_grad, grads) = mx.value_and_grad(of_chunk, argnums=(0, 1))(piece, list(arrays), start)
            grads = [x.astype(mx.float32) for x in grads]
            sums = grads if not sums else [a + b for a, b in zip(sums, grads)]
            losses.append(loss)
            row_grads.append(row_grad)
            before = [loss, row_grad, *sums]
        loss = mx.stack(losses).sum()
        return (loss, mx.concatenate(row_grads), *sums) if with_gradients else (loss,)

    @run.vjp
    def run_vjp(primals, cotangents, outputs):
        assert with_gradients, "linear_cross_entropy(with_gradients=False) has no gradient"
        scale = cotangents[0] if isinstance(cotangents, (tuple, list)) else cotangents
        grads = [(scale * grad).astype(x.dtype) for x, grad in zip(primals, outputs[1:])]
        return tuple(grads)

    def results(*arrays: mx.array) -> tuple[mx.array, ...]:
        found = run(*arrays)
        return tuple(found) if isinstance(found, (tuple, list)) else (found,)

    return results


def _nll(logits: mx.array, targets: mx.array, weights: mx.array, head: Head) -> tuple[mx.array, mx.array]:
    """Weighted sum of -log softmax(logits)[target], and its gradient for the logits (rows, V)."""
    group: comm.Group = head.group
    largest = group.all_max(logits.max(axis=-1, keepdims=True))
    powers = exp(logits - largest)
    local = (targets - head.first)[:, None]
    inside = (local >= 0) & (local < logits.shape[-1])
    local = mx.where(inside, local, 0)
    picked = mx.where(inside, mx.take_along_axis(logits, local, axis=-1) - largest, 0.0)
    total, picked = group.all_sum(mx.stack([powers.sum(axis=-1, keepdims=True), picked]))
    loss = (weights[:, None] * (mx.log(total) - picked)).sum()
    gradient = powers * (weights[:, None] / total)
    at_target = mx.take_along_axis(gradient, local, axis=-1) - mx.where(inside, weights[:, None], 0.0)
    return loss, mx.put_along_axis(gradient, local, at_target, axis=-1)


def _nll_with_gradient(logits: mx.array, targets: mx.array, weights: mx.array, head: Head) -> mx.array:
    """The loss of `_nll`, whose backward pass hands out the gradient made beside it (the cotangent is always
    1 here).
    """

    @custom_function
    def run(logits: mx.array) -> tuple[mx.array, mx.array]:
        return _nll(logits, targets, weights, head)

    @run.vjp
    def run_vjp(primal, cotangents, outputs):
        return outputs[1]

    return run(logits)[0]
