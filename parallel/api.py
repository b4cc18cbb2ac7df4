"""The training step that is the same on 1 and on N ranks: `value_and_grad`.

Losses and gradients are summed locally over micro-batches, summed over the data-parallel ranks, and divided
once by the weight (for a language model the number of target tokens) of all of them. So the result does not depend on
how a batch is cut into ranks and micro-batches, also when they hold different numbers of target tokens.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from comm.typed import number
from parallel.compiled import compiled
from parallel.row_threads import RowThreads
from parallel.sums import add_sums
from parallel.wrapper import parallel_state

Batch = dict[str, Any]  # arrays, and numbers that a loss takes as they are
LossFn = Callable[[nn.Module, Batch], tuple[mx.array, mx.array]]
Step = Callable[..., tuple[mx.array, Any, mx.array]]


Span = tuple[str, float, float]


class StepTimes:
    """When the phases of one step began and ended. `value_and_grad` fills `local`, `skew` and `reduce`.

    Each phase is evaluated before the next begins, so overlap is lost and only some steps are worth measuring.

    Attributes:
        spans: (phase, beginning, end) on this rank, in seconds of `time.perf_counter`; `skew` is the wait for the
            slowest rank.
    """

    def __init__(self):
        self.spans: list[Span] = []
        self._since = time.perf_counter()

    @property
    def seconds(self) -> dict[str, float]:
        """Phase to seconds."""
        return {phase: end - beginning for phase, beginning, end in self.spans}

    def end(self, phase: str, outputs: Any = ()) -> None:
        """Evaluate `outputs` and give the time since the last phase to this one."""
        mx.eval(outputs)
        now = time.perf_counter()
        self.spans.append((phase, self._since, now))
        self._since = now


def value_and_grad(
    model: nn.Module, loss_fn: LossFn, *, compile_local: bool = False, row_threads: RowThreads | None = None
) -> Step:
    """Build `step(micro_batches) -> (loss, grads, weight)` for a plain or wrapped model.

    Args:
        model: An `nn.Module`, or one wrapped by this package's wrappers.
        loss_fn: `loss_fn(model, batch) -> (loss_sum, weight)`: the SUM of the losses of one micro-batch (float32
            scalar) and what it is a sum over: how many tokens or pairs, or their weights (scalar, not negative).
        compile_local: Trace forward and backward of a micro-batch once per shape with `mx.compile`. `loss_fn` then
            cannot read values (`.item()`), and the model's flags are those of the first call. Summing over
            micro-batches and ranks stays outside. No effect under TensorParallel, PipelineParallel and
            FullyShardedDataParallel, whose messages lie inside. Default: False.
        row_threads: Threads that share, on a CPU, the rows of each micro-batch, whose arrays then all have the rows
            as their first axis; no effect under the same wrappers. Default: none.

    Returns:
        `step`: takes this rank's micro-batches, each `{"tokens": (B, L) int32, "mask": (B, L) bool,
        "segments": (B, L) int32}`, and returns the loss of all ranks and micro-batches over their weight
        (float32 scalar), the gradients of that mean (the tree of
        `model.trainable_parameters()`) and the weight. All three are lazy with one micro-batch; with
        more, each micro-batch is evaluated before the next so that only one holds activations, and so is what
        `row_threads` computed.
        `step(micro_batches, times)` fills a `StepTimes`; every rank must then pass one.

    Raises:
        ValueError: Both `compile_local` and `row_threads`; compiled functions belong to one thread.
    """
    if compile_local and row_threads:
        raise ValueError("compile_local and row_threads do not go together: the first is for GPUs, the second for CPUs.")
    state = parallel_state(model)
    local_step = state.runner(loss_fn) if state.runner else _accumulate(model, loss_fn, compile_local, row_threads)

    def step(micro_batches: Sequence[Batch], times: StepTimes | None = None) -> tuple[mx.array, Any, mx.array]:
        with state.step():
            loss, weight, grads = local_step(micro_batches)
        if times is not None:
            times.end("local", [loss, weight, grads])
            for group in state.loss_groups:
                group.barrier()
            times.end("skew")
        for reduce in state.reducers:
            grads = reduce(grads)
        if times is not None:
            times.end("reduce", grads)
        for group in state.loss_groups:
            loss, weight = group.all_sum(loss), group.all_sum(weight)
        if any(group.size > 1 for group in state.loss_groups):
            # Here, so that no GPU waits for a peer's number: Metal ends work that takes seconds.
            mx.eval(loss, weight)
        # A batch without any weight has zero gradients, not NaN.
        divisor = mx.where(weight > 0, weight, 1).astype(mx.float32)
        # In float32: as a bfloat16 the weight may be off by 0.4 %.
        grads = tree_map(lambda g: (g.astype(mx.float32) / divisor).astype(g.dtype), grads)
        return loss / divisor, grads, weight

    return step


def _accumulate(model: nn.Module, loss_fn: LossFn, compile_local: bool, row_threads: RowThreads | None) -> Callable:
    """Forward and backward of each micro-batch in turn; returns sums (loss, weight, grads)."""
    state = parallel_state(model)
    of_batch = _whole(model, loss_fn, compile_local and state.is_local)
    if row_threads and state.is_local:
        of_batch = _sliced(model, loss_fn, row_threads, of_batch)

    def run(micro_batches: Sequence[Batch]) -> tuple[mx.array, mx.array, Any]:
        total = None
        for batch in micro_batches:
            current = of_batch(batch)
            if len(micro_batches) > 1:
                current = add_sums(total, current)
                # A name for the summand would keep its buffers beside that of the sum.
                total = None
                mx.eval(current)
            total = current
        assert total is not None, "step() needs at least one micro-batch"
        return tuple(total)

    return run


def _whole(model: nn.Module, loss_fn: LossFn, compile_local: bool) -> Callable[[Batch], list[Any]]:
    """One micro-batch at once: its [loss_sum, weight, grads]."""
    phases = parallel_state(model).phases

    def forward(model: nn.Module, batch: Batch) -> tuple[mx.array, mx.array]:
        result = loss_fn(model, batch)
        phases.enter_backward()
        return result

    loss_and_grad = nn.value_and_grad(model, forward)
    if compile_local:
        loss_and_grad = compiled(model, loss_and_grad)

    def of_batch(batch: Batch) -> list[Any]:
        with phases.recording() as trace:
            (loss, weight), grads = loss_and_grad(model, batch)
        if trace.calls:
            phases.evaluate_forward(trace, (loss, weight))
            phases.evaluate_backward(trace, grads)
        return [loss, weight, grads]

    return of_batch


def _sliced(model: nn.Module, loss_fn: LossFn, row_threads: RowThreads, whole: Callable) -> Callable[[Batch], list[Any]]:
    """One micro-batch on threads, or at once where it is too small to share."""
    loss_and_grad = nn.value_and_grad(model, loss_fn)

    def of_batch(batch: Batch) -> list[Any]:
        return row_threads.sums(model, loss_and_grad, batch) or whole(batch)

    return of_batch


def evaluate(model: nn.Module, loss_fn: LossFn) -> Callable[[Iterable[Batch]], tuple[float, float]]:
    """Build `run(batches) -> (loss, weight)`: the mean loss over the batches of all ranks, without gradients.

    Args:
        model: A plain or wrapped model, as for `value_and_grad`.
        loss_fn: Gives a sum and its weight, as for `value_and_grad`.

    Returns:
        `run`: takes this rank's batches (equally many on every rank) and returns the loss of all
        ranks over its weight, and that.
    """
    state = parallel_state(model)
    forward = partial(state.forward, loss_fn) if state.forward else loss_fn

    def run(batches: Iterable[Batch]) -> tuple[float, float]:
        loss, weight = mx.array(0.0), mx.array(0)
        for batch in batches:
            with state.phases.recording() as trace:
                batch_loss, batch_weight = forward(model, batch)
            state.phases.evaluate_forward(trace, (batch_loss, batch_weight))
            loss, weight = loss + batch_loss, weight + batch_weight
            mx.eval(loss, weight)
        for group in state.loss_groups:
            loss, weight = group.all_sum(loss), group.all_sum(weight)
        return number(loss) / (number(weight) or 1), number(weight)

    return run
