"""The training loop: the same for every method and mesh.

It knows a step function, an optimizer, a stream of inputs and what to do when a row of metrics, a validation or
a checkpoint is due. What they are made of is decided in `trainer.build`.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

import comm
from parallel import StepTimes, clip_grad_norm
from parallel.api import Batch, Step
from parallel.wrapper import parallel_state
from trainer.batches import StepData, TrainingBatches
from trainer.optim import Optimizer
from trainer.throughput import Throughput, communication_row, memory_row


def clipped_gradients(
    step_fn: Step, micro_batches: list[Batch], max_norm: float | None, model: nn.Module, times: StepTimes | None = None
) -> tuple[mx.array, Any, mx.array, mx.array]:
    """Loss, clipped gradients, their norm before clipping, and the number of target tokens of one step; evaluated."""
    loss, grads, num_targets = step_fn(micro_batches, times)
    # Not together with the norm: its sum has MLX order the backward pass so that checkpointed layers are computed
    # again long before their turn, which took 2.4 times the memory.
    mx.eval(loss, num_targets, grads)
    grads, norm = clip_grad_norm(grads, max_norm, model)
    mx.eval(norm, grads)
    return loss, grads, norm, num_targets


@dataclass
class Progress:
    """How far a run is; saved with every checkpoint.

    Attributes:
        step: optimizer updates done, skipped ones included.
        num_tokens: real tokens seen.
        skipped_steps: updates left out because loss or gradient norm was not finite.
        window_loss, window_tokens: loss sum and target tokens since the last row of metrics.
        best_loss, bad_evals: lowest validation loss, and validations since.
    """

    step: int = 0
    num_tokens: int = 0
    skipped_steps: int = 0
    window_loss: float = 0.0
    window_tokens: int = 0
    best_loss: float | None = None
    bad_evals: int = 0

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


@dataclass
class Due:
    """How often things happen, in steps; 0 = only at the end."""

    log: int
    evaluate: int
    checkpoint: int


@dataclass
class Hooks:
    """What the loop calls; every rank calls the same ones at the same steps.

    Attributes:
        log: gets a row of metrics.
        advance: gets the number of updates done, after each.
        evaluate: validates at a step; returns the metrics, or an empty dict where there is nothing to validate.
        save: writes a checkpoint.
        stop_signal: number of the signal that asked this rank to stop, or 0.
    """

    log: Callable[[dict[str, float]], None]
    advance: Callable[[int], None]
    evaluate: Callable[[int], dict[str, float]]
    save: Callable[[Progress], None]
    stop_signal: Callable[[], int]


@dataclass
class Loop:
    """One run.

    Attributes:
        model: the (wrapped) model in training mode.
        step_fn: from `parallel.value_and_grad`.
        optimizer: updates the model.
        batches: this rank's inputs.
        total_steps: length of the run.
        rate: `rate(step)`, the learning rate of update number `step` (from 0).
        max_grad_norm: bound on the global gradient norm, or None.
        world: all ranks.
        due, hooks: what happens when.
        throughput: counts tokens and time between rows of metrics.
        patience: validations without a better loss before the run ends, or None.
        last_step: metrics of the latest step alone.
        usual_compute: seconds for loss and gradients of each step since the last row that ran undisturbed.
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
    patience: int | None = None
    last_step: dict[str, float] = field(default_factory=dict)
    usual_compute: list[float] = field(default_factory=list)

    def run(self, progress: Progress) -> int:
        """Train from `progress` to the end, or until a signal or the patience stops it.

        Returns:
            The number of the signal that ended the run, else 0. The last checkpoint is written either way.
        """
        signal = 0
        last_saved = progress.step if progress.step else None
        self.throughput.restart()
        waiting_since = time.perf_counter()
        for data in self.batches.steps(progress.step, self.total_steps):
            self.last_step = {"time/data_s": time.perf_counter() - waiting_since}
            # With a row for every step there is no undisturbed one to count instead.
            sampled = self._is_sampled(progress) and self.due.log > 1
            with self.throughput.paused() if sampled else nullcontext():
                self._step(data, progress, counted=not sampled)
            self.hooks.advance(progress.step)
            if self._is_due(self.due.log, progress):
                self._log(progress)
            stop = False
            if self._is_due(self.due.evaluate, progress):
                with self.throughput.paused():
                    stop = self._evaluate(progress)
            signal = self._agreed_signal()
            stop = stop or signal != 0
            if stop or self._is_due(self.due.checkpoint, progress):
                with self.throughput.paused():
                    self.hooks.save(progress)
                last_saved = progress.step
            if stop:
                break
            waiting_since = time.perf_counter()
        if last_saved != progress.step:
            self.hooks.save(progress)
        return signal

    def _step(self, data: StepData, progress: Progress, counted: bool) -> None:
        """One update, or a counted skip when loss or norm is not finite (equal on all ranks, being reduced)."""
        times = StepTimes() if self._is_sampled(progress) else None
        started = time.perf_counter()
        loss, grads, norm, num_targets = clipped_gradients(
            self.step_fn, data.arrays(), self.max_grad_norm, self.model, times
        )
        computed = time.perf_counter()
        rate = self.rate(progress.step)
        finite = math.isfinite(loss.item()) and math.isfinite(norm.item())
        if finite:
            self.optimizer.update(self.model, grads, rate)
            mx.eval(self.model.trainable_parameters(), self.optimizer.state)
            progress.window_loss += loss.item() * num_targets.item()
            progress.window_tokens += num_targets.item()
        else:
            progress.skipped_steps += 1
        progress.step += 1
        progress.num_tokens += data.num_tokens
        if counted:
            self.throughput.add(data.num_tokens, data.num_rows, data.num_slots)
        self.last_step |= {
            "train/grad_norm": norm.item(),
            "train/learning_rate": rate,
            "time/compute_s": computed - started,
            "time/optimizer_s": time.perf_counter() - computed,
        }
        if times is None:
            self.usual_compute.append(computed - started)
        else:
            self.last_step |= communication_row(times, self.usual_compute, self.model, self.world)
            self.usual_compute.clear()

    def _is_sampled(self, progress: Progress) -> bool:
        """Whether the coming step is measured in phases: the one before a row, where ranks share the batch."""
        shared = any(group.size > 1 for group in parallel_state(self.model).groups.values())
        return shared and (progress.step + 1) % self.due.log == 0

    def _log(self, progress: Progress) -> None:
        row = {
            "train/global_step": progress.step,
            "train/epoch": progress.step / self.batches.steps_per_epoch,
            "train/num_tokens": progress.num_tokens,
            "train/skipped_steps": progress.skipped_steps,
        }
        if progress.window_tokens:
            row["train/loss"] = progress.window_loss / progress.window_tokens
        progress.window_loss, progress.window_tokens = 0.0, 0
        self.hooks.log(row | self.last_step | self.throughput.row() | memory_row())

    def _evaluate(self, progress: Progress) -> bool:
        """Validate; returns whether the patience is used up."""
        loss = self.hooks.evaluate(progress.step).get("eval/loss")
        if loss is None:
            return False
        if progress.best_loss is None or loss < progress.best_loss:
            progress.best_loss, progress.bad_evals = loss, 0
        else:
            progress.bad_evals += 1
        return self.patience is not None and progress.bad_evals >= self.patience

    def _is_due(self, every: int, progress: Progress) -> bool:
        return progress.step == self.total_steps or (every > 0 and progress.step % every == 0)

    def _agreed_signal(self) -> int:
        """The signal that any rank received; asked after every step so that all ranks stop at the same one."""
        return int(self.world.all_max(mx.array(self.hooks.stop_signal(), dtype=mx.int32)).item())
