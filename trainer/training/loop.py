"""The training loop: the same for every method and mesh.

It knows a step function, an optimizer, a stream of inputs and what to do when a row of metrics, a validation or
a checkpoint is due. What they are made of is decided in `trainer.build`.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

import comm
from parallel import Batch, Span, Step, StepTimes, clip_grad_norm, parallel_state
from trainer.metrics.throughput import Throughput, communication_row, memory_row
from trainer.training.batches import StepData, TrainingBatches
from trainer.training.optim import Optimizer
from trainer.training.progress import Progress, StopRules


def clipped_gradients(
    step_fn: Step, micro_batches: list[Batch], max_norm: float | None, model: nn.Module, times: StepTimes | None = None
) -> tuple[mx.array, Any, mx.array, mx.array]:
    """Loss, clipped gradients, their norm before clipping, and the weight of one step; evaluated."""
    loss, grads, weight = step_fn(micro_batches, times)
    # Not together with the norm: its sum has MLX order the backward pass so that checkpointed layers are computed
    # again long before their turn, which took 2.4 times the memory.
    mx.eval(loss, weight, grads)
    grads, norm = clip_grad_norm(grads, max_norm, model)
    mx.eval(norm, grads)
    return loss, grads, norm, weight


@dataclass
class Due:
    """How often things happen, in steps; 0 = only at the end."""

    log: int
    evaluate: int
    checkpoint: int


@dataclass(frozen=True)
class Request:
    """What was asked of a run from outside.

    Attributes:
        signal: Number of the signal that is to end it, or 0.
        checkpoint: Whether a checkpoint is wanted now.
    """

    signal: int = 0
    checkpoint: bool = False


@dataclass
class Hooks:
    """What the loop calls; every rank calls the same ones at the same steps.

    Attributes:
        log: Gets a row of metrics.
        evaluate: Validates at a step; returns the metrics, or an empty dict where there is nothing to validate.
        save: Writes a checkpoint.
        before_step: Gets the number of the coming update; returns whether to measure it in phases.
        after_step: Gets the number of an update, and the spans of its phases.
        stop_signal: Number of the signal that asked this rank to stop, or 0.
        checkpoint_wanted: Whether this rank was asked for a checkpoint.
    """

    log: Callable[[dict[str, float]], None]
    evaluate: Callable[[int], dict[str, float]] = lambda step: {}
    save: Callable[[Progress], None] = lambda progress: None
    before_step: Callable[[int], bool] = lambda step: False
    after_step: Callable[[int, list[Span]], None] = lambda step, spans: None
    stop_signal: Callable[[], int] = lambda: 0
    checkpoint_wanted: Callable[[], bool] = lambda: False


@dataclass
class Loop:
    """One run.

    Attributes:
        model: The (wrapped) model in training mode.
        step_fn: The step that `parallel.value_and_grad` has built.
        optimizer: Updates the model.
        batches: This rank's inputs.
        total_steps: Length of the run.
        rate: `rate(step)`, the learning rate of update number `step` (from 0).
        max_grad_norm: Bound on the global gradient norm, or None.
        world: All ranks.
        due, hooks: What happens when.
        throughput: Counts tokens and time between rows of metrics.
        rules: What ends the run before its last step.
        last_step: Metrics of the latest step alone.
        usual_compute: Seconds for loss and gradients of each step since the last row that ran undisturbed.
    """

    model: nn.Module
    step_fn: Step
    optimizer: Optimizer
    batches: TrainingBatches
    total_steps: int
    rate: Callable[[int], float]
    max_grad_norm: float | None
    world: comm.Group
    due: Due
    hooks: Hooks
    throughput: Throughput
    rules: StopRules = StopRules()
    last_step: dict[str, float] = field(default_factory=dict)
    usual_compute: list[float] = field(default_factory=list)
    _saved_step: int | None = field(default=None, init=False)

    def run(self, progress: Progress) -> int:
        """Train from `progress` to the end, or until a signal or one of the rules stops it.

        Returns:
            The number of the signal that ended the run, else 0. The last checkpoint is written in any case.
        """
        request = Request()
        self._saved_step = progress.step or None
        self.throughput.restart()
        clock = StepTimes()
        for data in self.batches.steps(progress.step, self.total_steps):
            clock.end("data")
            self._train(data, progress, clock)
            if self._is_due(self.due.log, progress):
                self._log(progress)
            is_best = self._is_due(self.due.evaluate, progress) and self._validate(progress)
            request = self._agreed_request()
            is_over = bool(request.signal) or self.rules.is_over(progress)
            if is_over or request.checkpoint or is_best or self._is_due(self.due.checkpoint, progress):
                self._save(progress)
            if is_over:
                break
            clock = StepTimes()
        if self._saved_step != progress.step:
            self._save(progress)
        return request.signal

    def _train(self, data: StepData, progress: Progress, clock: StepTimes) -> None:
        """One update, counted in the throughput unless it is measured in phases."""
        phases = self._phases(progress)
        # With a row for every step there is no undisturbed one to count instead.
        is_counted = phases is None or self.due.log == 1
        with nullcontext() if is_counted else self.throughput.paused():
            self._update(data, progress, clock, phases)
        if is_counted:
            self.throughput.add(data.num_tokens, data.num_rows, data.num_slots)
        self.hooks.after_step(progress.step, clock.spans + (phases.spans if phases else []))

    def _update(self, data: StepData, progress: Progress, clock: StepTimes, phases: StepTimes | None) -> None:
        """One update, or a counted skip when loss or norm is not finite (equal on all ranks, being reduced)."""
        loss, grads, norm, weight = clipped_gradients(
            self.step_fn, data.arrays(), self.max_grad_norm, self.model, phases
        )
        clock.end("compute")
        rate = self.rate(progress.step)
        if math.isfinite(comm.number(loss)) and math.isfinite(comm.number(norm)):
            self.optimizer.update(self.model, grads, rate)
            progress.window_loss += comm.number(loss) * comm.number(weight)
            progress.window_tokens += comm.number(weight)
        else:
            progress.skipped_steps += 1
        clock.end("optimizer", [self.model.trainable_parameters(), self.optimizer.state])
        progress.step += 1
        progress.num_tokens += data.num_tokens
        self.last_step = {f"time/{phase}_s": seconds for phase, seconds in clock.seconds.items()}
        self.last_step |= {"train/grad_norm": comm.number(norm), "train/learning_rate": rate}
        if phases is None:
            self.usual_compute.append(clock.seconds["compute"])
        else:
            self.last_step |= communication_row(phases, self.usual_compute, self.model, self.world)
            self.usual_compute.clear()

    def _phases(self, progress: Progress) -> StepTimes | None:
        """For the coming step, if it is measured in phases: before a row where ranks share the batch, or on request."""
        is_traced = self.hooks.before_step(progress.step + 1)
        shared = any(group.size > 1 for group in parallel_state(self.model).groups.values())
        is_sampled = shared and (progress.step + 1) % self.due.log == 0
        return StepTimes() if is_traced or is_sampled else None

    def _log(self, progress: Progress) -> None:
        row = {
            "train/global_step": progress.step,
            "train/epoch": progress.step / self.batches.steps_per_epoch,
            "train/num_tokens": progress.num_tokens,
            "train/skipped_steps": progress.skipped_steps,
        }
        if progress.window_tokens:
            row["train/loss"] = progress.window_loss / progress.window_tokens
        self.rules.note_row(progress, row.get("train/loss"))
        progress.window_loss, progress.window_tokens = 0.0, 0
        self.hooks.log(row | self.last_step | self.throughput.row() | memory_row())

    def _validate(self, progress: Progress) -> bool:
        """Measure the model; whether this is the best validation so far, and its checkpoint is to be kept."""
        with self.throughput.paused():
            loss = self.hooks.evaluate(progress.step).get("eval/loss")
        return self.rules.note_validation(progress, loss)

    def _save(self, progress: Progress) -> None:
        with self.throughput.paused():
            self.hooks.save(progress)
        self._saved_step = progress.step

    def _is_due(self, every: int, progress: Progress) -> bool:
        return progress.step == self.total_steps or (every > 0 and progress.step % every == 0)

    def _agreed_request(self) -> Request:
        """What any rank was asked for. One message after every step, so that all ranks act at the same one.

        A signal outranks a checkpoint, which it brings anyway.
        """
        own = 2 * self.hooks.stop_signal() + self.hooks.checkpoint_wanted()
        signal, checkpoint = divmod(int(comm.number(self.world.all_max(mx.array(own, dtype=mx.int32)))), 2)
        return Request(signal, bool(checkpoint))
