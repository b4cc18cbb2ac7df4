"""How far a run is, and the rules that end it before its last step.

The rules see numbers that are equal on all ranks, so every rank comes to the same verdict without a message.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

WATCHDOG_ROWS = 3


@dataclass
class Progress:
    """How far a run is; saved with every checkpoint.

    Attributes:
        step: Optimizer updates done, skipped ones included.
        run: The number of this run in the output folder, counted from 1; 0 = written before runs were counted.
        num_tokens: Real tokens seen.
        skipped_steps: Updates left out because loss or gradient norm was not finite.
        window_loss, window_tokens: Sum of the loss and its weight since the last row of metrics.
        best_loss, best_step: Lowest validation loss, and the step that has it.
        bad_evals: Validations since then.
        high_rows: Rows of metrics in a row whose loss is above the watchdog's bound.
    """

    step: int = 0
    run: int = 0
    num_tokens: int = 0
    skipped_steps: int = 0
    window_loss: float = 0.0
    window_tokens: float = 0
    best_loss: float | None = None
    best_step: int | None = None
    bad_evals: int = 0
    high_rows: int = 0

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    @classmethod
    def resumed(cls, values: dict[str, Any]) -> "Progress":
        """From a checkpoint; a run that the watchdog had given up gets its rows anew."""
        progress = cls(**values)
        if progress.high_rows >= WATCHDOG_ROWS:
            progress.high_rows = 0
        return progress

    def forget_best(self) -> None:
        """Choose the best validation anew."""
        self.best_loss, self.best_step, self.bad_evals = None, None, 0


@dataclass(frozen=True)
class StopRules:
    """When a run ends before its last step.

    Attributes:
        patience: Validations without a better loss, or None. Only with it the best checkpoint is kept.
        highest_loss: The run is given up when the training loss of `WATCHDOG_ROWS` rows of metrics, one after
            the other, is above this, or not finite; None = never.
    """

    patience: int | None = None
    highest_loss: float | None = None

    def note_row(self, progress: Progress, loss: float | None) -> None:
        """Take in a row's training loss; None when no step of the row had a finite one."""
        if self.highest_loss is None or (loss is not None and loss <= self.highest_loss):
            progress.high_rows = 0
        else:
            progress.high_rows += 1

    def note_validation(self, progress: Progress, loss: float | None) -> bool:
        """Take in a validation's loss, None where there is none; returns whether its checkpoint is to be kept."""
        if loss is None:
            return False
        if math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss):
            progress.best_loss, progress.best_step, progress.bad_evals = loss, progress.step, 0
            return self.patience is not None
        progress.bad_evals += 1
        return False

    def is_over(self, progress: Progress) -> bool:
        """Whether one of the rules ends the run."""
        return self.is_given_up(progress) or self.is_patience_used_up(progress)

    def is_patience_used_up(self, progress: Progress) -> bool:
        """Whether the validation loss has not become better for long enough."""
        return self.patience is not None and progress.bad_evals >= self.patience

    def is_given_up(self, progress: Progress) -> bool:
        """Whether the training loss has been too high for long enough."""
        return self.highest_loss is not None and progress.high_rows >= WATCHDOG_ROWS
