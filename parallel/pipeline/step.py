"""One training step on one pipeline stage: the actions of its schedule carried out.

Both passes of a micro-batch are traced at once, with a message that has not come yet as the gradient of the
stage's result. The forward pass is evaluated then, and when that message is there, the backward pass; nothing
is computed twice.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from parallel.api import Batch, LossFn
from parallel.phases import Trace
from parallel.pipeline.schedule import plan_actions
from parallel.pipeline.stage import Stage
from parallel.sums import add_sums
from parallel.wrapper import parallel_state


class PipelineStep:
    """The micro-batches of one training step on one stage; its methods are the kinds of actions."""

    def __init__(self, model: nn.Module, loss_fn: LossFn, micro_batches: Sequence[Batch]):
        assert micro_batches, "step() needs at least one micro-batch"
        self.model, self.loss_fn, self.micro_batches = model, loss_fn, micro_batches
        self.stage: Stage = model.stage
        self.phases = parallel_state(model).phases
        self.parameters = tree_flatten(model.trainable_parameters())
        self.incoming: dict[int, mx.array | None] = {}
        self.outgoing: dict[int, mx.array] = {}
        self.gradients: dict[int, mx.array] = {}
        self.pending: dict[int, _Pending] = {}
        self.total: Any = None
        # Float32, as no stage but the last knows the type of its loss function's weight.
        self.loss, self.weight = mx.array(0.0), mx.array(0.0)

    def run(self) -> tuple[mx.array, mx.array, Any]:
        """Sums (loss, weight, grads); loss and weight are zero but on the last stage."""
        stage = self.stage
        rank, size, count = stage.group.rank, stage.group.size, len(self.micro_batches)
        if count < size and rank == 0:
            text = f"{count} micro-batches for {size} pipeline stages leave stages idle; use more."
            warnings.warn(text, stacklevel=4)
        stage.busy_seconds, started = 0.0, time.perf_counter()
        for kind, i in plan_actions(stage.schedule, rank, size, count):
            getattr(self, kind)(i)
        stage.step_seconds = time.perf_counter() - started
        # A stage that trains nothing has an empty tree.
        values = iter(_exchange_shared(stage, [n for n, _ in self.parameters], self.total or []))
        return self.loss, self.weight, tree_map(lambda _: next(values), self.model.trainable_parameters())

    def recv_activation(self, i: int) -> None:
        """Get the hidden states of micro-batch `i` from the stage before."""
        self.incoming[i] = self.stage.receive_for(self.loss_fn, self.model, self.micro_batches[i])

    def forward(self, i: int) -> None:
        """Trace both passes of micro-batch `i`, evaluate the first."""
        started = time.perf_counter()
        pending = self._trace(i, self.incoming.pop(i, None))
        self.phases.evaluate_forward(pending.trace, pending.result)
        self._computed(started)
        if self.stage.passage.is_last:
            self.loss, self.weight = self.loss + pending.result, self.weight + pending.weight.astype(mx.float32)
            mx.eval(self.loss, self.weight)
        else:
            self.outgoing[i] = pending.result
        pending.result = None
        self.pending[i] = pending

    def send_activation(self, i: int) -> None:
        """Pass the result on."""
        self.stage.send(self.outgoing.pop(i))

    def recv_gradient(self, i: int) -> None:
        """Wait for the gradient of the result."""
        mx.eval(self.pending[i].cotangent)

    def backward(self, i: int) -> None:
        """Evaluate the second pass and add its gradients up."""
        started = time.perf_counter()
        pending = self.pending.pop(i)
        names = [name for name, _ in self.parameters]
        grads = pending.grads[: len(names)]
        self.phases.evaluate_backward(pending.trace, tree_unflatten(list(zip(names, grads))), pending.grads)
        if not self.stage.passage.is_first:
            self.gradients[i] = pending.grads[-1]
        del pending
        if len(self.micro_batches) > 1:
            grads = add_sums(self.total, grads)
            self.total = None
            mx.eval(grads)
        self.total = grads
        self._computed(started)

    def send_gradient(self, i: int) -> None:
        """Pass the gradient of what came in back."""
        mx.eval(self.stage.group.send(self.gradients.pop(i), self.stage.group.rank - 1))

    def _trace(self, i: int, incoming: mx.array | None) -> "_Pending":
        """Both passes of a micro-batch as graphs; nothing is computed."""
        names, arrays = [n for n, _ in self.parameters], [p for _, p in self.parameters]
        primals = [*arrays, *([] if incoming is None else [incoming])]
        batch, model, stage = self.micro_batches[i], self.model, self.stage
        weights: list[mx.array] = []

        def run(*primals: mx.array) -> list[mx.array]:
            model.update(tree_unflatten(list(zip(names, primals))))
            result = stage.run(lambda: self.loss_fn(model, batch), primals[-1] if incoming is not None else None)
            if stage.passage.is_last:
                result, weight = result
                weights.append(weight)
            self.phases.trace.in_backward = True
            return [result]

        try:
            with self.phases.recording() as trace:
                cotangent = self._cotangent(i, run, primals)
                # A trace for the form alone is not to be evaluated.
                trace.calls.clear()
                trace.in_backward = False
                if primals:
                    (result,), grads = mx.vjp(run, primals, [cotangent])
                else:
                    (result,), grads = run(), []
        finally:
            # What the trace left in the model belongs to that trace.
            model.update(tree_unflatten(self.parameters))
        return _Pending(trace, result, grads, cotangent, weights[-1] if weights else None)

    def _cotangent(self, i: int, run: Callable, primals: list[mx.array]) -> mx.array:
        """What the result's gradient will be: 1 for a loss, else a message that is not asked for yet."""
        stage = self.stage
        if stage.passage.is_last:
            return mx.array(1.0)
        if stage.outgoing is None:
            # Traced once for its form; nothing of it is computed.
            (result,) = run(*primals)
            shape, dtype = result.shape, result.dtype
        else:
            dims, dtype = stage.outgoing
            shape = (*stage.shape_of_inputs(self.loss_fn, self.model, self.micro_batches[i]), dims)
        return stage.group.recv(shape, dtype, stage.group.rank + 1)

    def _computed(self, started: float) -> None:
        self.stage.busy_seconds += time.perf_counter() - started


class _Pending:
    """A micro-batch between its two passes."""

    def __init__(
        self, trace: Trace, result: mx.array, grads: list[mx.array], cotangent: mx.array, weight: mx.array | None
    ):
        self.trace, self.result, self.grads = trace, result, grads
        self.cotangent, self.weight = cotangent, weight


def _exchange_shared(stage: Stage, names: list[str], grads: list[mx.array]) -> list[mx.array]:
    """Gradients with those of tied embeddings added up over the first and the last stage, alike on both."""
    passage, group = stage.passage, stage.group
    if passage.is_first == passage.is_last:
        return grads
    summed = list(grads)
    for index in [k for k, name in enumerate(names) if name in stage.shared]:
        mine = grads[index]
        peer = group.size - 1 if passage.is_first else 0
        if passage.is_first:
            mx.eval(group.send(mine, peer))
        other = group.recv_like(mine, peer)
        mx.eval(other)
        if passage.is_last:
            mx.eval(group.send(mine, peer))
        summed[index] = mine + other
    return summed
