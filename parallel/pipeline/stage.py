"""One rank's place in a pipeline: what goes into its layers, and the messages with its neighbours.

Letters: B rows, L tokens, D hidden dims, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

import comm
from comm.typed import integers
from parallel.api import Batch, LossFn

DTYPES = (mx.float32, mx.bfloat16, mx.float16)


class LeftStage(Exception):
    """Carries the hidden states out of a stage that is not the last; what comes after the model is not run."""

    def __init__(self, hidden: mx.array):
        super().__init__("hidden states of a stage")
        self.hidden = hidden


class SeenInputs(Exception):
    """Carries the shape of the tokens that a loss function gives to the model."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__("shape of the tokens")
        self.shape = shape


class Passage:
    """What goes into a stage's layers in one forward pass; the stage's modules read it.

    Attributes:
        is_first, is_last: Which ends of the model this stage has.
        incoming: `(B, L, D)` from the stage before; None on the first.
        state: "closed" | "looking" (report the tokens' shape) | "open" (one forward pass) | "used".
    """

    def __init__(self, is_first: bool, is_last: bool):
        self.is_first = is_first
        self.is_last = is_last
        self.incoming: mx.array | None = None
        self.state = "closed"

    def enter(self, tokens: mx.array) -> None:
        """Called by the decoder stack with its tokens.

        Raises:
            ValueError: The model is run outside of a pipeline step, or twice in one loss.
        """
        if self.state == "looking":
            raise SeenInputs(tokens.shape)
        if self.state == "closed":
            raise ValueError("hidden_and_head on a pipeline works inside a loss_fn of parallel.value_and_grad only.")
        if self.state == "used":
            raise ValueError("Under PipelineParallel a loss_fn may call the model once.")
        self.state = "used"


class Stage:
    """One rank's place in the pipeline, and its messages.

    Attributes:
        group: The stages.
        own: Numbers of this stage's layers.
        passage: What its modules read.
        schedule: Name of the schedule.
        shared: Names of parameters that the first and the last stage both have.
        outgoing: Width and dtype of the hidden states that leave; None before the first.
        busy_seconds, step_seconds: Time spent computing in the latest step, and its length.
    """

    def __init__(self, group: comm.Group, own: range, passage: Passage, schedule: str, shared: list[str]):
        self.group = group
        self.own = own
        self.passage = passage
        self.schedule = schedule
        self.shared = shared
        self.busy_seconds = self.step_seconds = 0.0
        self._incoming: tuple[int, mx.Dtype] | None = None
        self.outgoing: tuple[int, mx.Dtype] | None = None
        self._logits: tuple[int, mx.Dtype] | None = None

    def run(self, call: Callable[[], Any], incoming: mx.array | None) -> Any:
        """What `call` returns on the last stage, the hidden states `(B, L, D)` on the others."""
        passage = self.passage
        passage.state, passage.incoming = "open", incoming
        try:
            result = call()
        except LeftStage as left:
            return left.hidden
        finally:
            passage.state, passage.incoming = "closed", None
        if not passage.is_last:
            raise ValueError("Under PipelineParallel a loss_fn must call the model.")
        return result

    def shape_of_inputs(self, loss_fn: LossFn, model: nn.Module, batch: Batch) -> tuple[int, ...]:
        """Shape of the tokens that `loss_fn` gives to the model."""
        self.passage.state = "looking"
        try:
            loss_fn(model, batch)
        except SeenInputs as seen:
            return seen.shape
        finally:
            self.passage.state = "closed"
        raise ValueError("Under PipelineParallel a loss_fn must call the model.")

    def receive_for(self, loss_fn: LossFn, model: nn.Module, batch: Batch) -> mx.array | None:
        """The hidden states of a batch from the stage before; None on the first."""
        return None if self.passage.is_first else self.receive(self.shape_of_inputs(loss_fn, model, batch))

    def receive(self, shape: tuple[int, ...]) -> mx.array | None:
        """The hidden states of tokens of `shape` from the stage before; None on the first."""
        if self.passage.is_first:
            return None
        source = self.group.rank - 1
        if self._incoming is None:
            dims, dtype = integers(self.group.recv((2,), mx.int32, source))
            self._incoming = dims, DTYPES[dtype]
        width, kind = self._incoming
        hidden = self.group.recv((*shape, width), kind, source)
        mx.eval(hidden)
        return hidden

    def send(self, hidden: mx.array) -> None:
        """Hidden states to the next stage; returns when they are on their way."""
        target, kind = self.group.rank + 1, (hidden.shape[-1], hidden.dtype)
        if self.outgoing is None:
            # Once: how wide the hidden states are, and their dtype.
            mx.eval(self.group.send(mx.array([kind[0], DTYPES.index(kind[1])], dtype=mx.int32), target))
            self.outgoing = kind
        assert kind == self.outgoing, f"hidden states were {self.outgoing} and are {kind} now"
        # First the value, then the message: a GPU must not wait for a peer.
        mx.eval(hidden)
        mx.eval(self.group.send(hidden, target))

    def share_logits(self, logits: mx.array | None, shape: tuple[int, ...]) -> mx.array:
        """The last stage's logits on every stage; lazy."""
        last = self.group.size - 1
        if self._logits is None:
            kind = None if logits is None else [logits.shape[-1], DTYPES.index(logits.dtype)]
            dims, dtype = comm.broadcast_object(kind, self.group, last)
            self._logits = dims, DTYPES[dtype]
        dims, dtype = self._logits
        return self.group.broadcast(mx.zeros((*shape, dims), dtype=dtype) if logits is None else logits, last)
