"""Evaluation of one forward and backward pass in steps, so that few gathered weights are alive at a time.

MLX computes whatever it is asked for in one go and allocates far ahead. Here a traced pass is evaluated unit by
unit (a unit is a layer whose weights are sharded): the next unit's weights are on their way while this unit
computes, and what was gathered before is let go. Without units everything is evaluated at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from comm.typed import named_arrays


@dataclass
class UnitCall:
    """One use of a unit in a traced pass.

    Attributes:
        path: The unit's path in the model.
        forward: Messages that gather its weights for the forward pass.
        backward: Those that gather them again; empty where nothing needs them.
        outputs: What the unit returned.
    """

    path: str
    forward: list[mx.array] = field(default_factory=list)
    backward: list[mx.array] = field(default_factory=list)
    outputs: Any = None


@dataclass
class Trace:
    """The unit calls of one pass.

    Attributes:
        calls: Those of the forward pass, in order.
        recomputed: Those of layers that are computed again in the backward pass.
        in_backward: Whether the forward pass is over.
    """

    calls: list[UnitCall] = field(default_factory=list)
    recomputed: list[UnitCall] = field(default_factory=list)
    in_backward: bool = False

    def add(self, call: UnitCall) -> None:
        """Called by a unit each time it is used."""
        (self.recomputed if self.in_backward else self.calls).append(call)


class Phases:
    """Records the unit calls of traced passes and evaluates these along them.

    Attributes:
        trace: The pass that is being recorded, or None.
        peak_gathered_bytes: Most bytes of gathered weights on their way or in use at a time so far.
    """

    def __init__(self):
        self.trace: Trace | None = None
        self.peak_gathered_bytes = 0

    @contextmanager
    def recording(self) -> Iterator[Trace]:
        """Record the unit calls made within this context."""
        outer, self.trace = self.trace, Trace()
        try:
            yield self.trace
        finally:
            self.trace = outer

    def enter_backward(self) -> None:
        """Note that the forward pass of the pass that is being recorded is over."""
        assert self.trace is not None, "no pass is being recorded"
        self.trace.in_backward = True

    def evaluate_forward(self, trace: Trace, outputs: Any) -> None:
        """Evaluate `outputs` (arrays in any tree) and all that leads to them, one unit after the other.

        The trace then keeps no array alive but those of the backward pass.
        """
        for call, following in _pairs(trace.calls):
            self._gather(call.forward, following.forward if following else [])
            mx.eval(call.outputs)
            call.forward, call.outputs = [], None
        mx.eval(outputs)

    def evaluate_backward(self, trace: Trace, grads: Any, others: Any = ()) -> None:
        """Evaluate gradients, those of the last unit first.

        Args:
            trace: The record of the pass; `evaluate_forward` has gone over it.
            grads: Gradient tree under parameter names.
            others: Further arrays, evaluated at the end, such as the gradient of the pass's input.
        """
        named = dict(named_arrays(grads))
        again = {call.path: call.forward for call in trace.recomputed}
        steps = [(call.path, call.backward or again.get(call.path, [])) for call in reversed(trace.calls)]
        trace.calls, trace.recomputed = [], []
        again.clear()
        while steps:
            path, messages = steps.pop(0)
            self._gather(messages, steps[0][1] if steps else [])
            mx.eval([grad for name, grad in named.items() if name.startswith(f"{path}.")])
            del messages
        mx.eval(grads, others)

    def _gather(self, current: list[mx.array], following: list[mx.array]) -> None:
        """Wait for this unit's weights, and have the next unit's sent while it computes."""
        self.peak_gathered_bytes = max(self.peak_gathered_bytes, sum(m.nbytes for m in (*current, *following)))
        # On the host: GPU work that waits for a peer may be ended by the system.
        mx.eval(current)
        mx.async_eval(following)


def _pairs(calls: list[UnitCall]) -> Iterator[tuple[UnitCall, UnitCall | None]]:
    return zip(calls, [*calls[1:], None])
