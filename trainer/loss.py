"""The training loss: cross-entropy summed over target tokens, without the logits of the others.

Letters: B rows, L tokens, D hidden dims. Token t is predicted from hidden state t - 1.
"""

import mlx.core as mx
import mlx.nn as nn

from parallel import hidden_and_head
from trainer.lora import DropoutKeys


class TokenLoss:
    """`loss_fn(model, batch) -> (loss_sum, num_tokens)` for `parallel.value_and_grad`.

    Args:
        keys: gets the batch's dropout keys before the forward pass.
        packed: rows hold several documents; attention and recurrent state stay inside each.
    """

    def __init__(self, keys: DropoutKeys, packed: bool = False):
        self.keys = keys
        self.packed = packed

    def __call__(self, model: nn.Module, batch: dict[str, mx.array]) -> tuple[mx.array, mx.array]:
        """Sum of token losses (float32 scalar) and number of target tokens (int32 scalar) of one micro-batch.

        Args:
            model: maps tokens to logits; see `parallel.hidden_and_head`.
            batch: `tokens` (B, L) int32, `mask` (B, L) bool, `segments` (B, L) int32, `keys` (B, 2) uint32.
        """
        self.keys.current = batch["keys"]
        segments = batch["segments"] if self.packed else None
        hidden, head = hidden_and_head(model, batch["tokens"], segments)
        mask = batch["mask"][:, 1:]
        logits = head(hidden[:, :-1]).astype(mx.float32)
        losses = nn.losses.cross_entropy(logits, batch["tokens"][:, 1:])
        return mx.where(mask, losses, 0.0).sum(), mask.sum()
