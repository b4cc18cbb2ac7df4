"""The protocol of objectives: all that the trainer asks of what it minimises."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from trainer.data import EncodedRow
from trainer.metrics.table import Metric


class Objective(ABC):
    """What a step minimises. Subclass it for one of your own, and give that to `trainer.train`.

    Every rank has an equal one. It keeps no state between calls, as a run must continue from its checkpoint alone.

    Attributes:
        name: Stands in the checkpoints, which another objective cannot continue. Default: the class's name.
        reads_segments: `loss` keeps the rows of a packed line apart by `segments`, as `parallel.hidden_and_head` does when
            it gets them. Default: False, and lines hold one row each.
        metrics: Rows of the metric table for the keys that `validation` adds to it.

    Example:
        >>> class Focal(Objective):
        ...     def loss(self, model, batch):
        ...         logits = model(batch["tokens"][:, :-1]).astype(mx.float32)
        ...         losses = nn.losses.cross_entropy(logits, batch["tokens"][:, 1:])
        ...         mask = batch["mask"][:, 1:]
        ...         return (mask * losses * (1 - mx.exp(-losses)) ** 2).sum(), mask.sum()
        >>> train("recipes/quickstart.yaml", objective=Focal())
    """

    name: str = ""
    reads_segments: bool = False
    metrics: tuple[Metric, ...] = ()

    def __init_subclass__(cls) -> None:
        cls.name = vars(cls).get("name", cls.__name__)

    def sequences(self, row: EncodedRow) -> Sequence[EncodedRow]:
        """The sequences that are trained for one row of the data, such as the row itself. Default: that.

        What comes out is cached with the tokens under `name`, so change that with this.
        """
        return (row,)

    @abstractmethod
    def loss(self, model: nn.Module, batch: dict[str, mx.array]) -> tuple[mx.array, mx.array]:
        """The loss of one micro-batch, as a sum and its weight.

        The loss of a step is the sum over all micro-batches and ranks, divided once by the summed weight; so are its
        gradients.

        Args:
            model: Maps tokens to logits; see also `parallel.hidden_and_head`.
            batch: `tokens` (B, L) int32 and `mask` (B, L) bool, True where a token is learned; where lines hold several
                rows, `segments` (B, L) int32, the number of each token's row in its line, 0 for padding; and perhaps
                `max_targets`, the most True entries of a mask of this shape.

        Returns:
            The sum, a float32 scalar, and what it is a sum over (tokens, pairs), a scalar.
        """

    def validation(self, loss: float) -> dict[str, float]:
        """The metrics of a validation.

        Args:
            loss: The mean of `loss` over the validation rows of all ranks.
        """
        return {"eval/loss": loss}
