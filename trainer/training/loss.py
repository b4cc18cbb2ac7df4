"""The loss function of a step: an objective's, once what the trainer put into the batch is where it belongs."""

import mlx.core as mx
import mlx.nn as nn

from trainer.model.lora import DropoutKeys
from trainer.objectives.objective import Objective


class StepLoss:
    """`loss_fn(model, batch) -> (loss_sum, weight)` for `parallel.value_and_grad`.

    Args:
        objective: Gives the loss.
        keys: Get the batch's dropout keys before the forward pass.
        packed: Lines hold several rows; without it the objective sees no `segments`.
    """

    def __init__(self, objective: Objective, keys: DropoutKeys, packed: bool) -> None:
        self.objective, self.keys, self.packed = objective, keys, packed

    def __call__(self, model: nn.Module, batch: dict[str, mx.array]) -> tuple[mx.array, mx.array]:
        """Sum and weight of one micro-batch.

        Args:
            model: The (wrapped) model.
            batch: As for `Objective.loss`, with `segments` always, and `keys` (B, 2) uint32.
        """
        self.keys.current = batch["keys"]
        hidden_names = ("keys",) if self.packed else ("keys", "segments")
        return self.objective.loss(model, {name: x for name, x in batch.items() if name not in hidden_names})
