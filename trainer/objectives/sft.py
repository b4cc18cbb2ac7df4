"""Supervised fine-tuning: cross-entropy over target tokens, without the logits of the others.

Letters: B rows, L tokens, D hidden dims. Token t is predicted from hidden state t - 1.
"""

import math

import mlx.core as mx
import mlx.nn as nn

from parallel import hidden_and_head
from trainer.layers.linear_cross_entropy import linear_cross_entropy
from trainer.objectives.objective import Objective


class SupervisedFineTuning(Objective):
    """The mean cross-entropy of the tokens that are learned."""

    name = "sft"
    reads_segments = True

    def loss(self, model: nn.Module, batch: dict[str, mx.array]) -> tuple[mx.array, mx.array]:
        """Sum of token losses (float32 scalar) and number of target tokens (int32 scalar); see `Objective.loss`."""
        hidden, head = hidden_and_head(model, batch["tokens"], batch.get("segments"))
        targets, mask = batch["tokens"][:, 1:], batch["mask"][:, 1:]
        options = {"max_targets": batch.get("max_targets"), "with_gradients": model.training}
        return linear_cross_entropy(hidden[:, :-1], head, targets, mask, **options)

    def validation(self, loss: float) -> dict[str, float]:
        """`eval/loss`, the mean over target tokens, and `eval/ppl`, its exponential."""
        return {"eval/loss": loss, "eval/ppl": math.exp(min(loss, 700.0))}
