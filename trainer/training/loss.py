"""The training loss: cross-entropy summed over target tokens, without the logits of the others.

Letters: B rows, L tokens, D hidden dims. Token t is predicted from hidden state t - 1.
"""

import mlx.core as mx
import mlx.nn as nn

from parallel import hidden_and_head
from trainer.layers.linear_cross_entropy import linear_cross_entropy
from trainer.model.lora import DropoutKeys


class TokenLoss:
    """`loss_fn(model, batch) -> (loss_sum, num_tokens)` for `parallel.value_and_grad`.

    Args:
        keys: gets the batch's dropout keys before the forward pass.
        packed: rows hold several documents; attention and recurrent state stay inside each.
    """

    def __init__(self, keys: DropoutKeys, packed: bool):
        self.keys = keys
        self.packed = packed

    def __call__(self, model: nn.Module, batch: dict[str, mx.array]) -> tuple[mx.array, mx.array]:
        """Sum of token losses (float32 scalar) and number of target tokens (int32 scalar) of one micro-batch.

        Args:
            model: maps tokens to logits; see `parallel.hidden_and_head`.
            batch: `tokens` (B, L) int32, `mask` (B, L) bool, `segments` (B, L) int32, `keys` (B, 2) uint32, and
                perhaps `max_targets`, the most True entries of a mask of this shape.
        """
        self.keys.current = batch["keys"]
        segments = batch["segments"] if self.packed else None
        hidden, head = hidden_and_head(model, batch["tokens"], segments)
        targets, mask = batch["tokens"][:, 1:], batch["mask"][:, 1:]
        options = {"max_targets": batch.get("max_targets"), "with_gradients": model.training}
        return linear_cross_entropy(hidden[:, :-1], head, targets, mask, **options)
