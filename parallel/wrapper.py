"""How a wrapper takes hold of a module: the same object comes back, its class extended.

`DataParallel(model)` returns `model` itself, now an instance of both `DataParallel` and its own class, as
PyTorch's `fully_shard` does. Parameter names, flags, attributes and `isinstance` stay as they were, and
`update`, `freeze` or `train` reach what they always reached. What the wrappers around one module have to
know of each other lives in one `ParallelState` on the module.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

import comm
from comm.typed import custom_function
from parallel.extension import extend, take_back
from parallel.phases import Phases

# Axes whose wrappers send messages, or evaluate, inside the forward and backward pass.
_INNER_AXES = frozenset(("dp_shard", "pp", "tp"))


@dataclass
class ParallelState:
    """What the wrappers around one module agreed on.

    Attributes:
        groups: Mesh axis name ("dp_replicate", "dp_shard", "pp", "tp") to the group of that axis.
        reducers: Functions that sum a gradient tree over the data-parallel ranks, applied in order.
        fusions: What sums whole gradients over the replicas; tells the bytes of its messages.
        loss_groups: Groups over which loss sums and token counts are summed.
        runner: `runner(loss_fn) -> run(micro_batches) -> (loss_sum, weight, grads)` in place of the plain
            forward and backward of the micro-batches (pipeline), or None.
        forward: `forward(loss_fn, model, batch) -> (loss_sum, weight)` in place of `loss_fn`, or None.
        phases: Evaluates a traced pass in steps.
        repeated: Names of parameters that another pipeline stage has too, and counts (tied embeddings).
        in_step: A step of `parallel.value_and_grad` is computing this rank's gradients.
    """

    groups: dict[str, comm.Group] = field(default_factory=dict)
    reducers: list[Callable[[Any], Any]] = field(default_factory=list)
    fusions: list[comm.GradientFusion] = field(default_factory=list)
    loss_groups: list[comm.Group] = field(default_factory=list)
    runner: Callable | None = None
    forward: Callable | None = None
    phases: Phases = field(default_factory=Phases)
    repeated: frozenset[str] = frozenset()
    in_step: bool = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """Within this context gradients are those of a step, which sums them over the ranks afterwards."""
        self.in_step = True
        try:
            yield
        finally:
            self.in_step = False

    def guarded(self, outputs: Any) -> Any:
        """What a model returns, any tree of arrays; on several replicas its gradient exists within a step only."""
        replicas = self.groups.get("dp_replicate")
        if self.in_step or replicas is None or replicas.size == 1:
            return outputs
        reason = (
            "nn.value_and_grad on a DataParallel model gives the gradients of this rank's rows only, and the ranks would "
            "drift apart; train with parallel.value_and_grad."
        )
        return tree_map(lambda output: without_gradient(output, [], reason), outputs)

    @property
    def is_local(self) -> bool:
        """Whether forward and backward are nothing but computation: no wrapper but DataParallel is on the model."""
        return _INNER_AXES.isdisjoint(self.groups)


if TYPE_CHECKING:
    _Extended = nn.Module  # what `__new__` makes of it
else:
    _Extended = object


class Wrapper(_Extended):
    """Base of the wrappers: `__new__` extends the module's class, the wrapper's `__init__` then runs on it.

    A wrapper's `__init__` must not call `super().__init__`: around another wrapper that is the inner
    wrapper's, which has run already.

    Args:
        module: The module to wrap; it is returned, not copied.
        group: Ranks that take part. Default: the world of `comm.init()`.

    Raises:
        TypeError: `module` is not an `mlx.nn.Module`.
        ValueError: The module already has this wrapper.
    """

    def __new__(cls, module: nn.Module, group: comm.Group | None = None, **options: Any) -> Self:
        if not isinstance(module, nn.Module):
            raise TypeError(f"{cls.__name__} wraps an mlx.nn.Module, got {type(module).__name__}.")
        if isinstance(module, cls):
            raise ValueError(f"This {type(module).__name__} is already wrapped in {cls.__name__}.")
        extend(module, cls, f"{cls.__name__}{type(module).__name__}")
        return cast(Self, module)

    def join(self, axis: str, group: comm.Group | None) -> comm.Group:
        """Record `group` (None = the world) as the module's group of the mesh axis `axis`, and return it."""
        if not hasattr(self, "parallel_state"):
            self.parallel_state = ParallelState()
        group = comm.init() if group is None else group
        self.parallel_state.groups[axis] = group
        return group


def parallel_state(model: nn.Module) -> ParallelState:
    """The state that the wrappers left on `model`; an empty one for a plain module."""
    return getattr(model, "parallel_state", None) or ParallelState()


def unwrap(model: nn.Module) -> nn.Module:
    """Take every wrapper off `model`: its class is the original one again, its parameters stay as they are.

    Weights that a wrapper split (TensorParallel, FullyShardedDataParallel) stay split.
    """
    while isinstance(model, Wrapper):
        take_back(model)
    if hasattr(model, "parallel_state"):
        del model.parallel_state
    return model


def without_gradient(output: mx.array, parameters: list[mx.array], reason: str) -> mx.array:
    """`output`, whose gradient, and that of `parameters`, raises `ValueError(reason)` instead of being silently wrong."""

    @custom_function
    def leave(output: mx.array, *parameters: mx.array) -> mx.array:
        return output

    @leave.vjp
    def leave_vjp(primals: Any, cotangent: Any, output: Any) -> Any:
        raise ValueError(reason)

    return leave(output, *parameters)
